"""Evaluation: what a model still knows of the forget set, and how well it still works. Unlearning does not need it."""
