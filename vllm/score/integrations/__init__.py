"""Score mode inside other tools."""
