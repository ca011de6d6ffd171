"""Phi-4-mini-flash, SambaY: a recurrent half, one layer of full attention, a half that only reads.

The first half alternates Mamba and windowed attention. Then one Mamba layer lends what its scan reads out,
and one layer of full attention lends its keys and values. In the second half gated memory units read the
former and attention the latter: neither keeps anything, so that a prefill runs them for the last token alone
(`Config.late`). All attention is differential, and nothing has positions.

Source: Ren et al. 2025, arXiv:2507.06607; sizes of phi4miniflash_d32 in the released code, which gives keys
no bias where the checkpoint's single projection has one: without positions it changes nothing.
"""

from effattn_lite.models.config import Config, Norm, Part

TYPES = ()


def config(
    *, vocab, width, depth, heads, kv_heads, head_dim, hidden, window, states=16, conv_size=4, expand=2,
    eps=1e-5,
):  # fmt: skip
    """SambaY of `depth` layers, a multiple of 4.

    Mamba "M" and a window "W"; lenders of memory "S" and of keys and values "A"; their readers "G" and "C".
    """
    if depth % 4:
        raise ValueError(f"depth is {depth}, expected a multiple of 4")
    mamba = dict(states=states, conv_size=conv_size, expand=expand)
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=True, norm_eps=eps)
    return Config(
        name="phi4_mini_flash",
        vocab=vocab,
        width=width,
        pattern="MW" * (depth // 4) + "SA" + "GC" * (depth // 4 - 1),
        mixers={
            "M": Part("mamba", **mamba),
            "W": Part("differential_attention", window=window, **attention),
            "S": Part("lending_mamba", lends="memory", **mamba),
            "A": Part("differential_attention", lends="kv", **attention),
            "G": Part("gated_memory", memory=expand * width, borrows="memory"),
            "C": Part("differential_attention", borrows="kv", **attention),
        },
        feed_forwards={"F": Part("gated", hidden=hidden)},
        norm=Norm("layer", eps=eps, bias=True),
        tie=True,
    )


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=8, heads=4, kv_heads=2, head_dim=8, hidden=64, window=8, states=8
    ),
    "3.8b": config(
        vocab=200_064, width=2560, depth=32, heads=40, kv_heads=20, head_dim=64, hidden=10_240, window=512
    ),
}
