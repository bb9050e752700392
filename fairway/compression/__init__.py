"""The model as a lossless compressor, and a score proved by decoding it."""
