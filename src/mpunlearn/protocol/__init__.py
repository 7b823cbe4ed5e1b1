"""What both parties see: the training plan, what crosses between them, messages, transfers, and Flower."""
