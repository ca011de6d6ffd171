"""Induction heads: a special token stood once in the text; it comes again: what followed it?"""

import numpy as np

from effattn_lite.tasks.ask import NOTHING

SPECIAL = 0
"""The token that comes twice; all others are 1 and up."""


def draw(
    rng: np.random.Generator, *, batch: int, length: int = 256, vocab: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the induction task: the last token is SPECIAL, its target what followed it before.

    Args:
        rng: source of the samples.
        batch: B.
        length: T, at least 3.
        vocab: tokens, SPECIAL included.

    Returns:
        tokens and targets, [B, T].

    Raises:
        ValueError: the text is too short.

    Source: Olsson et al. 2022, arXiv:2209.11895; as a task Gu and Dao 2023, arXiv:2312.00752.
    """
    if length < 3:
        raise ValueError(f"length is {length}, expected at least 3")
    tokens = rng.integers(1, vocab, (batch, length))
    row, first = np.arange(batch), rng.integers(0, length - 2, batch)
    tokens[row, first], tokens[:, -1] = SPECIAL, SPECIAL
    targets = np.full((batch, length), NOTHING)
    targets[:, -1] = tokens[row, first + 1]
    return tokens, targets
