"""Runs only at the model owner: the secret, the noise, the reparameterizations, and both passes over the model."""
