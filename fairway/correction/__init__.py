"""Correction tables: the rows of a split that a model predicts worst, and their right tokens.

A table is a diagnosis and never a score: it is made from the text that it corrects.
"""
