"""Imported by train_unmodified.py, to show that the folder of a script is on its path."""

VALUE = 42
