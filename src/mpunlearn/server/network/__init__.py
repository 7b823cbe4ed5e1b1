"""The server's side of a run over a network.

`serve` implements the commands `server start` and `server resume`. The `coordinator` decides what happens next;
`roster`, `publication`, `jobs`, `results`, `deadlines` and `status` each manage one part of the run, in files below the
run's directory (`folder`). `superlink` and `gateway` run Flower, which transports the messages.
"""
