"""Blocks that several kernels share, each tested alone."""
