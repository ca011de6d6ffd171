"""Scores arrive block by block: running maximum, sum and output, in a rounded number format."""

import numpy as np

from effattn_lite.explore.figure import Explorable


class OnlineSoftmax(Explorable):
    """A stream of scores and values, and the three numbers kept of it; the subtraction can be switched off.

    Args:
        block: scores taken at a time: 1, 2, 4, 8, 16 or 32.
        scale: factor of all scores; at 6 the largest is near 13.
        format: "float16" or "float32", in which every operation is rounded.
        subtract: take every exponential relative to the running maximum.
        step: blocks taken in already.
        seed: of the 32 scores (normal) and their values (uniform between 0 and 10); with 304 the maximum
            moves four times, last in the last block of four.
    """

    name = "online_softmax"
    alt = (
        "Scores arrive block by block; the running maximum, the sum and the weighted sum are updated, in "
        "float16 or float32, and their quotient is compared with the exact mean. Without subtracting the "
        "maximum the sums overflow."
    )

    def __init__(self, block=4, scale=6.0, *, format="float16", subtract=True, step=0, seed=304):
        rng = np.random.default_rng(seed)
        state = dict(block=block, scale=scale, format=format, subtract=subtract, step=step)
        state["scores"] = np.round(rng.normal(size=32), 3)
        state["values"] = np.round(rng.uniform(0, 10, size=32), 2)
        super().__init__(**state)
