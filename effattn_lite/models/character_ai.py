"""Character.AI: short windows, one global layer in six, one head of keys and values, shared between layers.

The blog post gives what makes the cache more than 20 times smaller: multi-query attention in all layers; a
window of 1024 in five of six; neighbouring windowed layers that share keys and values, two or three each;
and global layers that share them across blocks. Not published: all sizes, which layers share with which, how
many global layers share, positions, norms, feed-forward. Here these are Llama's, groups of three and two,
and as many blocks as `share` says; the preset "7b" has the sizes of Llama 2 7B, to compare caches with.

Source: Character.AI 2024, "Optimizing AI Inference at Character.AI"; MixAttention, arXiv:2409.15012, tries
the same parts in public.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope

TYPES = ()


def config(
    *, vocab, width, blocks, share, heads, hidden, window=1024, turns=None, eps=1e-5, tie=False
):  # fmt: skip
    """`blocks` times six layers: windows "W", whose followers "w" borrow, and a global one.

    Of the global layers of `share` blocks the first, "G", lends and the others, "g", borrow.
    """
    if blocks % share:
        raise ValueError(f"blocks is {blocks}, expected a multiple of share = {share}")
    common = dict(heads=heads, kv_heads=1, rope=turns or Rope())
    near = common | {"window": window}
    return Config(
        name="character_ai",
        vocab=vocab,
        width=width,
        pattern="WwwWwG" + "WwwWwg" * (share - 1),
        depth=6 * blocks,
        mixers={
            "W": Part("attention", lends="near", **near),
            "w": Part("attention", borrows="near", **near),
            "G": Part("attention", lends="far", **common),
            "g": Part("attention", borrows="far", **common),
        },
        feed_forwards={"F": Part("gated", hidden=hidden)},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, blocks=2, share=2, heads=4, hidden=48, window=8),
    "7b": config(vocab=32_000, width=4096, blocks=6, share=3, heads=32, hidden=11_008),
}
