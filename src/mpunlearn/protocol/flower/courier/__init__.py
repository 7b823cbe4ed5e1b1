"""The Flower app that transports messages between folders. It imports nothing from the rest of the package."""
