"""Experts as products of low-rank factors."""
