"""Experts that learn from the text as it is scored, and their mixture with the neural model."""
