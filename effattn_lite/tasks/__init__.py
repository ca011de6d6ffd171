"""Synthetic tasks that tell sequence mixers apart; each module draws samples of one, with NumPy alone.

`draw(rng, batch=..., ...)` returns tokens and targets, int64 [B, T]; a target of -100 asks for nothing.
"""
