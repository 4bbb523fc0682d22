"""Scaling studies: many ordinary runs of different size and data, and what their curves say."""
