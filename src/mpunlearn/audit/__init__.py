"""Measures what each party can learn about the other's private assets."""
