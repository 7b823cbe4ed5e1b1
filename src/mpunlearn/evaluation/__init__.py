"""What a model still knows, and what it can still do. Neither party needs it to unlearn."""
