"""Interactive figure of book/models/linear_hybrids.md: a pattern of layers, and what it costs at a length."""

from effattn_lite.explore.figure import Explorable
from effattn_lite.reference import lightning_attention, mamba

LETTERS = {
    "M": ("Mamba", "state space"),
    "L": ("lightning attention", "fixed decay"),
    "W": ("attention in a window of 4,096", "fixed pattern"),
    "A": ("attention", "softmax attention"),
}
"""Letter of a mixer -> its name and the family whose colour it has."""

FEEDS = {"F": "one feed-forward", "E": "16 experts, two of them used"}
JAMBA = dict(width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14_336, experts=16, top=2, window=4096)
PERIOD, REPEATS, VOCAB = 8, 4, 65_536


class HybridComposer(Explorable):
    """A period of eight layers, four times over, at Jamba's sizes: weights, cache, work against the length.

    Args:
        pattern: eight letters of LETTERS.
        feeds: letters of FEEDS, repeated until there are eight.
        context: tokens so far, a power of two from 1,024 to 4,194,304.
    """

    name = "hybrid_composer"
    alt = (
        "Eight layers of a period, each a letter that a press changes, four times over. Two plots show the "
        "bytes of the cache and the FLOPs of the next token against the length, for this pattern and for "
        "attention in all layers, with the length from which the pattern is cheaper."
    )

    def __init__(self, pattern="MMMMAMMM", feeds="FE", context=262_144):
        feeds = (feeds * PERIOD)[:PERIOD] if feeds else feeds
        for word, value, known in (("pattern", pattern, LETTERS), ("feeds", feeds, FEEDS)):
            if len(value) != PERIOD or set(value) - set(known):
                raise ValueError(f"{word} is {value!r}, expected {PERIOD} letters of {''.join(known)}")
        if context not in (lengths := [2**n for n in range(10, 23)]):
            raise ValueError(f"context is {context}, expected one of {lengths}")
        super().__init__(
            pattern=pattern,
            feeds=feeds,
            context=context,
            lengths=lengths,
            repeats=REPEATS,
            letters=[[letter, name, family] for letter, (name, family) in LETTERS.items()],
            kinds=list(FEEDS.items()),
            prices=prices(**JAMBA),
            ends=2 * VOCAB * JAMBA["width"] + JAMBA["width"],
        )


def prices(*, width, heads, kv_heads, head_dim, hidden, experts, top, window, states=16, taps=4, rank=None):
    """What one layer's mixer, or feed-forward, has and does at a token, its norm included.

    Args:
        width, heads, kv_heads, head_dim: D, H, HKV and K = V of attention; lightning attention has H heads.
        hidden, experts, top: entries of a feed-forward, how many experts there are, and how many are used.
        window: tokens that "W" sees.
        states, taps, rank: of Mamba; the rank is D / 16 by default.

    Returns:
        letter -> dict of `weights`; `used`, those that a token meets; `flops` of a token; `flops_token` more
        for each token in sight, at most `sees` of them (0: all); `bytes` of the cache, and `bytes_token` more
        for each of these tokens: keys, values and tails in 16 bits, states in 32.

    Cost: a product of a vector and n weights is 2 n FLOPs; a softmax's own few are left out.
    """
    D, inner, rank = width, 2 * width, rank or -(-width // 16)
    Q, KV, lightning = heads * head_dim, kv_heads * head_dim, heads * head_dim
    attention = dict(_weights(2 * D * Q + 2 * D * KV, D), flops_token=4 * Q, bytes_token=2 * 2 * KV, bytes=8)
    products = 2 * D * inner + inner * (rank + 2 * states) + rank * inner + inner * D
    vectors = inner * (taps + 1) + inner * (2 + states) + rank + 2 * states
    scan = mamba.cost(form="recurrent", B=1, T=1, D=inner, M=states)
    fade = lightning_attention.cost(form="recurrent", B=1, T=1, H=heads, K=head_dim, V=head_dim)
    one = 3 * D * hidden
    return {
        "A": attention | {"sees": 0},
        "W": attention | {"sees": window - 1},
        "M": _weights(
            products,
            D + vectors,
            flops=scan["flops"] + 2 * inner * taps,
            bytes=scan["state_bytes"] + 2 * inner * (taps - 1),
        ),
        "L": _weights(5 * D * lightning, D + lightning, flops=fade["flops"], bytes=fade["state_bytes"]),
        "F": _weights(one, D),
        "E": _weights(D * experts + experts * one, D, idle=(experts - top) * one),
    }


def _weights(products, vectors, *, idle=0, flops=0, bytes=0):
    used = products - idle
    return dict(
        weights=products + vectors,
        used=used + vectors,
        flops=2 * used + flops,
        flops_token=0,
        bytes=bytes,
        bytes_token=0,
        sees=0,
    )
