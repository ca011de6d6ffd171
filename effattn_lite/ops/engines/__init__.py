"""Engines in eager torch, each with the choice between itself and its Triton kernels."""
