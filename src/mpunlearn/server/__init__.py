"""The model owner's code: secret, noise, reparameterizations, publishing of copies, aggregation of updates."""
