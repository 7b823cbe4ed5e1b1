"""The client's side of a run over a network.

`join` has the verbs. The `worker` does jobs that come through a `spool` folder, as far as the `policy` allows. `supernode` runs
Flower, which carries the messages and sees nothing but the spool folder.
"""
