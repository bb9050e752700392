"""A run's time, memory, bytes and dollars, predicted before a machine is rented.

This room reads files only: the settings in the source of train_gpt.py, published step times, logs.
It imports neither torch nor the trainer, so that it answers at once.
"""
