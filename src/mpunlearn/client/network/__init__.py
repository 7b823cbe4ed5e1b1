"""The client's side of a run over a network.

A *job* is the server's signed request to unlearn on one copy of its model. `join` has the commands. The `worker` does
the jobs that arrive in a `spool` folder, within the limits of the client's `policy`. `supernode` runs Flower, which
carries the messages and uses only the spool folder.
"""
