"""The work itself: reading, folding, writing, and what is said about it afterwards."""
