"""The embedded benchmark and the demonstrations."""
