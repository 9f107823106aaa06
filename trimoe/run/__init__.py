"""Finished folders at work: loading, kernels for packed experts, measuring speed."""
