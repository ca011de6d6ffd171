"""Selective copying: data tokens lie scattered in noise; say them again, in order."""

import numpy as np

from effattn_lite.tasks.ask import NOTHING

NOISE, ANSWER = 0, 1
"""Tokens: noise, and the slot where an answer is due; data tokens are 2 and up."""


def draw(
    rng: np.random.Generator,
    *,
    batch: int,
    length: int = 256,
    data: int = 8,
    vocab: int = 16,
    scattered: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of selective copying: noise with data tokens in it, then as many answer slots.

    Args:
        rng: source of the samples.
        batch: B.
        length: T, the answer slots included.
        data: data tokens in a text.
        vocab: data tokens are 2 to vocab - 1.
        scattered: at random places, so that what is data must be seen from the token; False: at the start,
            where a mixer that only knows positions can copy them.

    Returns:
        tokens and targets, [B, T].

    Raises:
        ValueError: the data and their answers do not fit the text.

    Source: Gu and Dao 2023, arXiv:2312.00752, after Jing et al. 2019.
    """
    body = length - data
    if body < data:
        raise ValueError(f"length is {length}, expected at least 2 data = {2 * data}")
    said = rng.integers(2, vocab, (batch, data))
    tokens = np.full((batch, length), NOISE)
    at = (
        np.sort(rng.random((batch, body)).argsort(axis=1)[:, :data], axis=1) if scattered else np.arange(data)
    )
    tokens[np.arange(batch)[:, None], at] = said
    tokens[:, body:] = ANSWER
    targets = np.full((batch, length), NOTHING)
    targets[:, body:] = said
    return tokens, targets
