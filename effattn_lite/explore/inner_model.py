"""Interactive figure of book/linear/test_time_training.md: a model that is trained on what it reads."""

import numpy as np

from effattn_lite.explore.figure import Explorable

MODELS = (("line", "a line"), ("network", "a network"))
"""Inner models: key, words."""

STREAMS = (
    ("anywhere", "keys from anywhere"),
    ("sweep", "keys from left to right"),
    ("again", "one key, again and again"),
    ("change", "a map that changes at token 48"),
)
"""Texts to read: key, words."""

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
"""Learning rates to choose from."""

BATCHES = (1, 4, 8, 16, 48)
"""Tokens of a mini-batch to choose from."""


class InnerModel(Explorable):
    """The state of a reader as a curve: an inner model learns token by token, in mini-batches.

    A key is a number from -1 to 1, its value a number that a hidden map gives. Gradients are taken at the
    model that stood when the mini-batch began; every token's step is made at once.

    Args:
        inner: a key of MODELS.
        stream: a key of STREAMS.
        rate: learning rate, one of RATES.
        batch: tokens of a mini-batch, one of BATCHES.
        token: tokens read so far, 0 to 96.
        query: the key at which the model is read, -1 to 1.
    """

    name = "inner_model"
    alt = (
        "A hidden map as a dashed curve, the tokens read as dots on it, the inner model after the last token "
        "as a line and the one at which gradients are taken as a dotted line. Below, the squared error of "
        "each token at the model that its gradient was taken at, in mini-batches."
    )

    def __init__(self, inner="network", stream="anywhere", rate=0.1, batch=4, token=43, query=0.4):
        if inner not in [key for key, _ in MODELS]:
            raise ValueError(f"inner is {inner!r}, expected one of {[key for key, _ in MODELS]}")
        if stream not in [key for key, _ in STREAMS]:
            raise ValueError(f"stream is {stream!r}, expected one of {[key for key, _ in STREAMS]}")
        if not -1 <= query <= 1:
            raise ValueError(f"query is {query}, expected -1 to 1")
        rng = np.random.default_rng(5)
        hidden = 32
        super().__init__(
            inner=inner,
            inners=MODELS,
            stream=stream,
            streams=STREAMS,
            rate=min(RATES, key=lambda x: abs(x - rate)),
            rates=RATES,
            batch=min(BATCHES, key=lambda x: abs(x - batch)),
            batches=BATCHES,
            token=token,
            query=query,
            places=rng.uniform(-1, 1, 96).round(3),
            w1=(4 * rng.choice([-1.0, 1.0], hidden)).round(3),
            b1=(4 * rng.uniform(-1, 1, hidden)).round(3),
            w2=rng.normal(size=hidden).round(3),
        )
