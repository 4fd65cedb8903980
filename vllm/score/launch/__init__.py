"""The start of an engine: what is said meanwhile, where its output goes, and why it failed."""
