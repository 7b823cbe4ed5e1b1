"""The Flower app: two ends that carry sealed messages between folders. It imports nothing else of this package."""
