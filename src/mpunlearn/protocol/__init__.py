"""What both parties see: the plan, and what crosses between them."""
