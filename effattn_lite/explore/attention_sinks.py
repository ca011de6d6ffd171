"""Attention maps of a real model, with their sinks; what a window and a few kept tokens leave of them."""

from base64 import b64encode

import numpy as np

from effattn_lite import data
from effattn_lite.explore.figure import Explorable

HEADS = {(2, 1): "layer 18, head 1", (2, 4): "layer 18, head 7", (0, 0): "layer 7, head 0"}
"""Place in the arrays -> name: a head that reads, one that rests, one whose sink is not the first token."""

NATS = 80
"""Level n of a stored weight, 0 to 255, stands for exp(-NATS (n / 255)^2): finer for large weights."""


class AttentionSinks(Explorable):
    """Three heads of SmolLM2 at the beginning of Hamlet; the page recomputes every output under the mask."""

    name = "attention_sinks"
    alt = "Attention map of a head of SmolLM2: move the window, keep or drop the first tokens, see the error."

    def __init__(self, window=32, sinks=0, query=120, tokens=160):
        d = data.load("smollm2_qkv")
        super().__init__(
            window=window,
            sinks=sinks,
            query=query,
            head=0,
            names=list(HEADS.values()),
            words=[w.strip() or "line break" for w in d["tokens"][:tokens].tolist()],
            heads=[_packed(d, layer, head, tokens) for layer, head in HEADS],
            nats=NATS,
        )


def _packed(d, layer, head, T):
    """Weights of a head as levels of -log p, row after row of the triangle, and its values in 8 bits."""
    group = d["q"].shape[2] // d["k"].shape[2]
    q, k, v = (
        d[n][layer, :T, h].astype(float)
        for n, h in zip("qkv", (head, head // group, head // group), strict=True)
    )
    q, k = (_rotated(x, float(d["rope_theta"])) for x in (q, k))
    x = np.where(np.tri(T, dtype=bool), q @ k.T * q.shape[1] ** -0.5, -np.inf)
    m = x.max(1, keepdims=True)
    lse = m + np.log(np.exp(x - m).sum(1, keepdims=True))
    levels = np.round(255 * np.sqrt((lse - x)[np.tril_indices(T)] / NATS)).clip(0, 255).astype(np.uint8)
    size = np.abs(v).max() / 127
    return {
        "levels": b64encode(levels.tobytes()).decode(),
        "values": b64encode(np.round(v / size).astype(np.int8).tobytes()).decode(),
    }


def _rotated(x, theta):
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    a, b, cos, sin = x[:, :half], x[:, half:], np.cos(angle), np.sin(angle)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=1)
