"""Pictures and pages of documents, drawn by matplotlib, which nothing else here loads."""
