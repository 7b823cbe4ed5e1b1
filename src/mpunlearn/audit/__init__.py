"""What each side can learn of what the other holds."""
