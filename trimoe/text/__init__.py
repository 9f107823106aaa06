"""Calibration and evaluation text: files and data sets in, batches of tokens out."""
