"""What all tasks share: the target that asks for nothing, and the share of right answers."""

import numpy as np

NOTHING = -100
"""Target of a token where nothing is asked; torch's cross entropy leaves it out too."""


def accuracy(answers: np.ndarray, targets: np.ndarray) -> float:
    """Share of right answers where something is asked; NaN where nothing is.

    Args:
        answers, targets: [B, T], integers.
    """
    asked = targets != NOTHING
    return float((answers[asked] == targets[asked]).mean()) if asked.any() else float("nan")
