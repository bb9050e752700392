"""Turn finished runs into a record, and judge records of anyone. Reads files only; never loads a
model.
"""
