"""Experts that learn from the text as it is scored, and the mixture of all of them with the neural model."""
