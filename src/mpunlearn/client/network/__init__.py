"""The client's side of a run over a network."""
