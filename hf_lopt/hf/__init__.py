"""Learned optimizers inside transformers and Accelerate."""
