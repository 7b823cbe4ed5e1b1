"""What a model still knows, and what it can still do. Neither party needs it to unlearn."""

from mpunlearn.evaluation.evaluate import Report, evaluate

__all__ = ["Report", "evaluate"]
