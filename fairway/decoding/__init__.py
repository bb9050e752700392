"""Decoding: strategies, beam search and speculative decoding, from an artifact to text."""
