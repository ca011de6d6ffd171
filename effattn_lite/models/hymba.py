"""Hymba: in every layer heads of attention and of Mamba read the same input side by side.

All but three layers, the first, one in the middle and the last, see a window; neighbours among them share
keys and values, so that few layers keep any. Learned meta tokens stand in front of every text, and every
window shows them: attention that has nowhere to go goes there.

Source: Dong et al. 2024, arXiv:2411.13676, and the released code; sizes from the published configuration,
whose stretching of the rotary base is left out. Differs: the released mask of training shows a window one
token longer than decoding keeps; here both see what decoding keeps.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope

TYPES = ()


def config(
    *, vocab, width, pattern, heads, kv_heads, head_dim, hidden, window, meta, states=16, conv_size=4,
    expand=2, rank=None, turns=None, eps=1e-6, tie=True,
):  # fmt: skip
    """Hymba of some size: full attention "A", a window "W" that lends keys and values to "C" after it."""
    common = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=turns or Rope())
    common["value_dim"] = expand * width // heads
    near = common | dict(window=window, first=meta)
    mamba = dict(states=states, conv_size=conv_size, expand=expand, rank=rank, norm_eps=eps)
    return Config(
        name="hymba",
        vocab=vocab,
        width=width,
        pattern=pattern,
        mixers={
            "A": Part("parallel_heads", attention=common, mamba=mamba, eps=eps),
            "W": Part("parallel_heads", attention=near | {"lends": "kv"}, mamba=mamba, eps=eps),
            "C": Part("parallel_heads", attention=near | {"borrows": "kv"}, mamba=mamba, eps=eps),
        },
        feed_forwards={"F": Part("gated", hidden=hidden)},
        norm=Norm("rms", eps=eps),
        meta=meta,
        tie=tie,
    )


PRESETS = {
    "tiny": config(
        vocab=64, width=32, pattern="AWCAWCCA", heads=4, kv_heads=2, head_dim=8, hidden=64, window=6, meta=3,
        states=8,
    ),
    "1.5b": config(
        vocab=32_001, width=1600, pattern="A" + "WC" * 7 + "A" + "WCC" + "WC" * 6 + "A", heads=25, kv_heads=5,
        head_dim=64, hidden=5504, window=1024, meta=128, rank=100,
    ),
}  # fmt: skip
