"""What any language-model code needs and no party owns."""
