"""The model as a lossless compressor, and the proof of a score by decoding it."""
