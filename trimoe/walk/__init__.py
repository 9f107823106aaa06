"""Weights and tokens through a model, one decoder layer at a time."""
