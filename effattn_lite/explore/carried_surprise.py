"""Interactive figure of book/linear/titans.md: what carries a surprise into a memory."""

from effattn_lite.explore.figure import Explorable

STREAMS = (
    ("once", "an accident, told once"),
    ("news", "a change, told again and again"),
    ("noise", "a change amid noise"),
)
"""Texts about one key: key, words."""

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Learning rates to choose from."""


class CarriedSurprise(Explorable):
    """One key of a Titans memory: dials for rate, momentum, forgetting, mini-batch; two tokens to drag.

    The key has length 1 and its value is a number; other tokens are at right angles to it. One token brings a
    shock; at another the momentum can be cut to 0.

    Args:
        stream: a key of STREAMS.
        eta: learning rate, one of RATES.
        mu: share of the momentum that a token keeps, 0 to 0.98.
        keep: share of the memory that a token keeps: 0.9, 0.95, 0.98, 0.99, 0.995 or 1.
        batch: tokens of a mini-batch: 1, 4, 8 or 16.
        shock: token of the shock, from 1.
        cut: token at which the momentum is 0; 96: none.
    """

    name = "carried_surprise"
    alt = (
        "A stream of 96 tokens with a shock to drag. Above, each token's write and the momentum that carries "
        "it on; below, what the memory answers, beside memories without momentum. A second handle cuts the "
        "momentum at a later token."
    )

    def __init__(self, stream="once", eta=0.05, mu=0.95, keep=0.995, batch=1, shock=12, cut=96):
        streams = [key for key, _ in STREAMS]
        if stream not in streams:
            raise ValueError(f"stream is {stream!r}, expected one of {streams}")
        if not 0 <= mu <= 0.98:
            raise ValueError(f"mu is {mu}, expected 0 to 0.98")
        super().__init__(
            stream=stream,
            streams=STREAMS,
            eta=min(RATES, key=lambda x: abs(x - eta)),
            rates=RATES,
            mu=mu,
            keep=min((0.9, 0.95, 0.98, 0.99, 0.995, 1.0), key=lambda x: abs(x - keep)),
            batch=min((1, 4, 8, 16), key=lambda x: abs(x - batch)),
            shock=shock,
            cut=cut,
            tokens=96,
        )
