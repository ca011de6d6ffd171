"""Samba: Mamba and attention in a short window, in turn, a gated feed-forward after each.

Mamba carries what is far, in a state that does not grow; the window recalls exactly what is near. So the
cache stops growing after 2,048 tokens.

Source: Ren et al. 2024, arXiv:2406.07522; sizes, norms and the tied head from the released code.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope

TYPES = ()


def config(*, vocab, width, depth, heads, hidden, window=2048, states=16, kv_heads=None, eps=1e-5, tie=True):
    """Samba of some size: Mamba "M" and windowed attention "W"."""
    return Config(
        name="samba",
        vocab=vocab,
        width=width,
        pattern="MW",
        depth=depth,
        mixers={
            "M": Part("mamba", states=states),
            "W": Part("attention", heads=heads, kv_heads=kv_heads, window=window, rope=Rope(10_000.0)),
        },
        feed_forwards={"F": Part("gated", hidden=hidden)},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, heads=4, hidden=64, window=8, states=8),
    "421m": config(vocab=32_000, width=1536, depth=12, heads=12, hidden=4096),
    "1.3b": config(vocab=32_000, width=2304, depth=18, heads=18, hidden=6144),
}
