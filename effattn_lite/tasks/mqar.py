"""Multi-query associative recall: pairs of a key and a value, then some of the keys again: which value?"""

import numpy as np

from effattn_lite.tasks.ask import NOTHING


def draw(
    rng: np.random.Generator,
    *,
    batch: int,
    length: int = 64,
    pairs: int = 16,
    vocab: int = 512,
    power: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Samples of multi-query associative recall.

    The text is k_1 v_1 ... k_N v_N, then (T - 2N) / 2 places of two tokens, where each key stands once more;
    the target there is its value. A key comes at place j with a probability that goes as :math:`j^{a-1}`:
    for a small a early places are crowded, and a few keys are asked after a long time.

    Args:
        rng: source of the samples.
        batch: B.
        length: T, even, at least 4 N.
        pairs: N.
        vocab: keys are 1 to vocab / 2 - 1 and do not repeat, values vocab / 2 to vocab - 1; 0 is the filler.
        power: a.

    Returns:
        tokens and targets, [B, T].

    Raises:
        ValueError: the pairs do not fit the text, or the keys not the vocabulary.

    Source: Arora et al. 2023, arXiv:2312.04927; its code, zoology, `multiquery_ar`.
    """
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length is {length}, expected an even number from 4 pairs = {4 * pairs}")
    if vocab // 2 - 1 < pairs:
        raise ValueError(f"vocab is {vocab}, expected at least 2 pairs + 2 = {2 * pairs + 2}")
    half, places = vocab // 2, (length - 2 * pairs) // 2
    keys = 1 + rng.random((batch, half - 1)).argsort(axis=1)[:, :pairs]  # [B, N], none twice
    values = rng.integers(half, vocab, (batch, pairs))
    tokens = np.zeros((batch, length), np.int64)
    targets = np.full((batch, length), NOTHING)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    # the N smallest of exponential waiting times are a draw without replacement by weight
    weight = np.arange(1, places + 1) ** (power - 1.0)
    place = (rng.exponential(size=(batch, places)) / weight).argsort(axis=1)[:, :pairs]
    at, row = 2 * pairs + 2 * place, np.arange(batch)[:, None]
    tokens[row, at], targets[row, at] = keys, values
    return tokens, targets
