"""What the engine does for a score request: admission, row layout, scoring in the worker."""
