"""State tracking: the text is a walk through a finite group, and every token asks where it stands."""

import itertools

import numpy as np


def parity(rng: np.random.Generator, *, batch: int, length: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and at every bit whether the ones so far are odd: the walk of a group of two.

    Returns:
        tokens and targets, [B, T], 0 or 1.

    Source: as a test of linear recurrences, Grazzi et al. 2024, arXiv:2411.12537.
    """
    tokens = rng.integers(0, 2, (batch, length))
    return tokens, tokens.cumsum(axis=1) % 2


def permutations(
    rng: np.random.Generator, *, batch: int, length: int = 40, of: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Permutations of a few things, one a token, and at every token the product of all so far.

    Element n of the group is the n-th of `itertools.permutations(range(of))`; the latest is applied last.

    Args:
        of: how many things; 3 gives the 6 elements of S3, 5 the 120 of S5.

    Returns:
        tokens and targets, [B, T], from 0 to of! - 1.

    Source: the word problem of a group, Merrill et al. 2024, arXiv:2404.08819.
    """
    elements = np.array(list(itertools.permutations(range(of))))  # [of!, of]
    number = {tuple(p): n for n, p in enumerate(elements)}
    tokens = rng.integers(0, len(elements), (batch, length))
    targets = np.empty_like(tokens)
    for b, word in enumerate(tokens):
        now = np.arange(of)
        for t, n in enumerate(word):
            now = elements[n][now]
            targets[b, t] = number[tuple(now)]
    return tokens, targets
