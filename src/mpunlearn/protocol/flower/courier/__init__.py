"""The Flower app: two ends that carry sealed messages from folder to folder, and import nothing of the rest."""
