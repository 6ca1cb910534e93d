"""Results as documents: the one source of tables, JSON and pages."""
