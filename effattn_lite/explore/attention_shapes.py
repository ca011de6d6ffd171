"""Interactive figure of book/linear/shaped_features.md: real softmax rows beside linear ones."""

import numpy as np

from effattn_lite import data
from effattn_lite.explore.figure import Explorable

HEADS = ((0, 0), (1, 2), (2, 0), (2, 4))
QUERIES = (78, 116, 131, 143, 159)
SHARPNESS = (0.25, 0.5, 0.75, 1)
FEATURES = (("plain", "none: q · k"), ("relu", "positive: relu"), ("spiky", "spiky: softmax of [u; -u]"))
"""Kinds of features: key -> words."""


class AttentionShapes(Explorable):
    """Weights of one query of SmolLM2 on the tokens of Hamlet before it: its softmax, and a linear attention.

    Args:
        features: a key of FEATURES.
        local: whether weights are multiplied by a cosine of the distance.
        head: which of HEADS, 0 to 3.
        query: which of QUERIES, 0 to 4.
        sharpness: t of u = t x, a value of SHARPNESS.
    """

    name = "attention_shapes"
    alt = (
        "Bars above a line are the softmax weights of a query on the tokens before it; bars below are those "
        "of a linear attention whose features can be made positive, spiky, and its weights local. A second "
        "plot shows how far each choice is from the softmax, in nats."
    )

    def __init__(self, features="plain", local=False, head=0, query=4, sharpness=0.5):
        if features not in dict(FEATURES):
            raise ValueError(f"features is {features!r}, expected one of {list(dict(FEATURES))}")
        hamlet, T = data.load("smollm2_qkv"), max(QUERIES) + 1
        tokens = [str(t).replace("\n", "⏎") for t in hamlet["tokens"][:T]]
        super().__init__(
            features=features,
            local=local,
            head=head,
            query=query,
            sharpness=sharpness,
            kinds=FEATURES,
            sharpnesses=SHARPNESS,
            reach=T,
            reaches=[T, 2 * T, 4 * T],
            key=QUERIES[query],
            tokens=tokens,
            at=QUERIES,
            names=[f"layer {hamlet['layers'][i]}, head {hamlet['heads'][i, h]}" for i, h in HEADS],
            rows=[_rows(hamlet, i, h, T) for i, h in HEADS],
        )


def _rows(hamlet, i, h, T):
    q, k = (_rotate(hamlet[n][i, :T, j]) for n, j in (("q", h), ("k", h // 3)))
    found = []
    for t in QUERIES:
        a, b = q[t], k[: t + 1]
        score = b @ a
        softmax = np.exp(score / 8 - (score / 8).max())
        spiky = {f"{s:g}": _logs(_spiky(s * b) @ _spiky(s * a)) for s in SHARPNESS}
        signed = np.round(1000 * score / np.abs(score).max()).astype(int)
        found.append(
            {
                "softmax": _logs(softmax),
                "plain": signed,
                "relu": _logs(np.maximum(b, 0) @ np.maximum(a, 0)),
                "spiky": spiky,
            }
        )
    return found


def _logs(weights):
    # hundredths of a nat, as whole numbers: a weight within half a per cent
    p = weights / weights.sum()
    return np.round(100 * np.log(np.maximum(p, 1e-12))).astype(int)


def _spiky(x):
    u = np.concatenate((x, -x), axis=-1)
    e = np.exp(u - u.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _rotate(x):
    # SmolLM2's rotary positions: channels i and i + 32 turn together
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 100_000.0 ** (-np.arange(half) / half)
    a, b = x[:, :half].astype(float), x[:, half:].astype(float)
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate((a * c - b * s, b * c + a * s), axis=1)
