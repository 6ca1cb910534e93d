"""Judging adapters and merges: what was measured, against which limit, and what is wrong by name."""
