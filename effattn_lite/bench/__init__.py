"""Measure ops: time, floor, memory, decoding; `python -m effattn_lite bench NAME --record` keeps them."""
