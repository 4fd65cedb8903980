"""The start of an engine: its settings, what is said meanwhile, and why it failed."""
