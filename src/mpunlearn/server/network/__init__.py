"""The server's side of a run over a network.

`serve` has the verbs. The `coordinator` decides what happens next; `roster`, `publication`, `jobs`, `results`, `deadlines` and
`status` each keep one part of the run, in files below the run's directory (`folder`). `superlink` and `gateway` run Flower,
which carries the messages.
"""
