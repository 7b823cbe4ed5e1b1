"""Is a copy what it claims to be? Checks of a published copy, before the client trains on it.

The model is the server's, and a dishonest server can prepare one that writes the client's text into the update. The
checks look for what published constructions need: duplicated or silent neurons, neurons that a single position switches
on, sharp thresholds, templates that move or tag the text, a model that does not model language. They are an obstruction,
not a proof: a construction that stays below every limit passes, and what it then reveals is limited only by the sum over
many positions and over clients.
"""
