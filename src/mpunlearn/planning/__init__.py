"""Planning a run: which hyperparameters are recommended, and how much memory, disk, traffic and time the run takes."""
