"""Code shared by both parties: training plan, exchanged files, messages, file transfer, and Flower."""
