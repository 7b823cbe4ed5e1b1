"""Publishing an unlearned model on the Hugging Face Hub."""
