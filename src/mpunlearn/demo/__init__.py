"""The embedded benchmark and the demonstrations: a small world, trained in seconds, in which everything can be tried."""
