"""What a model still knows: metrics over question-answer examples."""
