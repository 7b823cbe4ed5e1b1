"""The server's side of a run over a network.

`serve` implements the commands `server start` and `server resume`. The `coordinator` decides what happens next;
`roster`, `publication`, `jobs`, `results`, `deadlines` and `status` each manage one part of the run, in files below the
run's directory (`folder`). `superlink` runs Flower, which transports the messages. `gateway` is a program of its own, the
only one that strangers reach, and `gatekeeper` decides whom it lets in.
"""
