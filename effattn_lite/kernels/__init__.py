"""Triton kernels, one file an engine. Nothing here is public."""
