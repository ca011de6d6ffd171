"""YOCO, you only cache once: the second half of the model borrows the keys and values of one layer.

The first half, the self-decoder, keeps a state or a window; from its output keys and values are made once,
and every layer of the second half, the cross-decoder, reads them with queries of its own. Memory is that of
one layer of attention. And since the second half keeps nothing, a prefill runs it for the last token alone
(`Config.late`): its time grows with the first half only.

Source: Sun et al. 2024, arXiv:2405.05254, and the released code. "K" of the pattern is no layer of the
paper's count: it is the norm and the two projections between the halves. The preset's vocabulary is that of
the training script, cl100k_base, rounded up to a multiple of 8.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope

TYPES = ()


def config(
    *, vocab, width, half, heads, cross_heads, kv_heads, hidden, window=None, theta=10_000.0, eps=1e-5,
    tie=False,
):  # fmt: skip
    """YOCO of some size: `half` layers of retention "R", or of a window "W", then as many that cross "C"."""
    own, across = width // heads, width // cross_heads
    return Config(
        name="yoco",
        vocab=vocab,
        width=width,
        pattern=("W" if window else "R") * half + "K" + "C" * half,
        feeds="F" * half + "." + "F" * half,
        mixers={
            "R": Part("gated_retention", heads=heads, rope=_turns(theta, own), norm_eps=eps),
            "W": Part("attention", heads=heads, window=window, rope=_turns(theta, own)),
            "K": Part(
                "keys_values", kv_heads=kv_heads, head_dim=across, rope=_turns(theta, across), lends="kv"
            ),
            "C": Part(
                "attention", heads=cross_heads, kv_heads=kv_heads, rope=_turns(theta, across), borrows="kv"
            ),
        },
        feed_forwards={"F": Part("gated", hidden=hidden), ".": None},
        norm=Norm("rms", eps=eps),
        embedding_scale=width**0.5,
        tie=tie,
    )


def _turns(theta, head_dim):
    """Their wavelengths reach 2 pi theta itself, the usual ones stay a pair below it; pairs are adjacent."""
    half = head_dim // 2
    return Rope(theta ** (half / max(half - 1, 1)), adjacent=True)


PRESETS = {
    "tiny": config(vocab=64, width=32, half=3, heads=4, cross_heads=4, kv_heads=2, hidden=64),
    "tiny_window": config(
        vocab=64, width=32, half=3, heads=4, cross_heads=4, kv_heads=2, hidden=64, window=8
    ),
    "3b": config(vocab=100_280, width=3072, half=13, heads=24, cross_heads=24, kv_heads=8, hidden=8192),
}
