"""From an artifact and a text to bits per byte."""
