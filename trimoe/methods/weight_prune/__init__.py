"""Zeros inside experts."""
