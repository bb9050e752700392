"""Tokens out of a model: strategies that choose one, searches that choose many, drafts that guess them sooner."""
