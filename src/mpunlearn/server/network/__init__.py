"""The server's side of a run over a network."""
