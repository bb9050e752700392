"""Compression methods, one module each, measured alike: `fairway compare`."""
