"""General language-model code: reading and tokenizing examples, loading models, forward passes and losses."""
