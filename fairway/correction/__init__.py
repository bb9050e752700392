"""Correction tables: positions and tokens that a split's worst predictions needed. A diagnosis, never a score."""
