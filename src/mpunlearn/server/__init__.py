"""Runs only at the model owner: the secret, the noise, the reparameterizations, and both passes over the model."""

from mpunlearn.server.describe import describe
from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from mpunlearn.server.state import ServerState

__all__ = ["Perturbation", "ServerState", "describe", "postprocess", "preprocess"]
