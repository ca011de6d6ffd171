"""MiniCPM-4: a plain decoder whose attention reads a few blocks of tokens, chosen by its own keys.

InfLLM-V2 in every layer: the first block, the last 32 and the 64 best of 64 tokens each. Up to 96 blocks,
6144 tokens, that is dense attention. Sizes of three places follow the width and depth: the embedding, what a
layer adds to the stream, and the logits.

Source: MiniCPM Team 2025, arXiv:2506.07900; Zhao et al. 2025, arXiv:2509.24663; sizes from published
configurations. Differs: the release takes dense attention for texts of less than 8192 tokens, whole, so that
a token's output would depend on how long its text becomes; it stretches positions by LongRoPE. Both are left
out.
"""

import math

from effattn_lite.models.config import Config, Norm, Part, Rope

TYPES = ()


def config(
    *, vocab, width, depth, heads, kv_heads, head_dim=None, hidden, theta=10_000.0, blocks=None,
    embedding=12.0, layers=1.4, base=256, eps=1e-6, tie=False,
):  # fmt: skip
    """MiniCPM-4 of some size; `blocks` are options of the attention, as top_k; default the published ones.

    The embedding grows by `embedding`, a layer's output by layers / sqrt(depth), logits by base / width.
    """
    gain = layers / math.sqrt(depth)
    return Config(
        name="minicpm4",
        vocab=vocab,
        width=width,
        pattern="B",
        depth=depth,
        mixers={
            "B": Part(
                "block_attention", gain=gain, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                rope=Rope(theta), **blocks or {},
            ),
        },
        feed_forwards={"F": Part("gated", gain=gain, hidden=hidden)},
        norm=Norm("rms", eps=eps),
        embedding_scale=embedding,
        logit_scale=base / width,
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, kv_heads=2, hidden=64, base=16,
        blocks=dict(block_size=4, top_k=2, init_blocks=1, local_blocks=2, kernel_size=2, kernel_stride=1),
    ),
    "0.5b": config(
        vocab=73_448, width=1024, depth=24, heads=16, kv_heads=2, hidden=4096, tie=True
    ),
    "8b": config(vocab=73_448, width=4096, depth=32, heads=32, kv_heads=2, hidden=16_384),
}  # fmt: skip
