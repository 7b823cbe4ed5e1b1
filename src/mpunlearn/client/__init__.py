"""Runs only at the data owner: examples, objectives, and the training that turns a published copy into an update."""

from mpunlearn.client.resources import Resources
from mpunlearn.client.unlearn import Client, unlearn
from mpunlearn.lm.sources import Data

__all__ = ["Client", "Data", "Resources", "unlearn"]
