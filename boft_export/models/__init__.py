"""Models in memory, through transformers: loaded, given inputs, and run under their adapters."""
