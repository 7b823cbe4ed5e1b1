"""Runs only at the data owner: examples, objectives, and the training that turns a published copy into an update."""

from mpunlearn.client.unlearn import unlearn

__all__ = ["unlearn"]
