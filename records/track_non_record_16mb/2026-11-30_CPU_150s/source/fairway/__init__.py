"""Rooms for everything after training: scores, proofs, text, exports, records."""
