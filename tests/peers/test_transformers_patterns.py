"""Outside truth: the attention of Longformer and BigBird in transformers, with random weights.

It shares nothing with this package: tokens are cut into overlapping chunks there, or blocks shifted side by
side. A layer's three or six projections are copied; what is compared is the mixed heads, before the last one.
"""

import numpy as np
import pytest
import torch

from effattn_lite.layers.common import split_heads
from effattn_lite.ops import block_sparse_attention, longformer
from effattn_lite.ops.bigbird import select
from effattn_lite.testing import EPS, max_error, relative_error

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

RTOL = 1e-10
# Longformer's softmax is float32 there, whatever its input: a weight is a few roundings off
SINGLE = 8 * EPS["float32"]
WIDTH, HEADS = 24, 3


def randomise(module):
    """Weights as large as those of a trained layer: near zero, all keys weigh alike."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def heads(*layers, x):
    """Projections of x, cut into heads, in the layout of this package."""
    return tuple(split_heads(layer(x), HEADS) for layer in layers)


def peer_longformer(window):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[window], num_hidden_layers=1
    )
    return randomise(LongformerSelfAttention(config, layer_id=0)).eval()


def run_longformer(peer, x, mask):
    """The peer on a text filled up to its window with noise, which it is told to hide by -1."""
    (B, T, D), window = x.shape, 2 * peer.one_sided_attn_window_size
    noise = torch.randn(B, -T % window, D, dtype=x.dtype)
    kinds = torch.cat((mask.to(x.dtype), torch.full(noise.shape[:2], -1, dtype=x.dtype)), dim=1)
    o = peer(
        torch.cat((x, noise), dim=1),
        attention_mask=10_000.0 * kinds,
        is_index_masked=kinds < 0,
        is_index_global_attn=kinds > 0,
        is_global_attn=bool(mask.any()),
    )[0]
    return o[:, :T]


def our_longformer(peer, x, **options):
    """The same by this package, from the peer's projections."""
    q, k, v = heads(peer.query, peer.key, peer.value, x=x)
    second = heads(peer.query_global, peer.key_global, peer.value_global, x=x)
    second = dict(zip(("q_global", "k_global", "v_global"), second, strict=True))
    return longformer(q, k, v, **second, **options, impl="torch").flatten(2)


@pytest.mark.parametrize("T, window", ((48, 8), (48, 24), (16, 16), (60, 4), (41, 8), (17, 16)))
@pytest.mark.parametrize("rows", (((), ()), ((0,), (0,)), ((0, 1, 2), (3, 15)), ((), (9, 4, 0, 13))), ids=str)
def test_longformer(T, window, rows):
    """Each batch row has its own global tokens."""
    peer, x = peer_longformer(window), torch.randn(2, T, WIDTH, dtype=torch.float64)
    mask = torch.zeros(2, T, dtype=torch.bool)
    for row, positions in zip(mask, rows, strict=True):
        row[list(positions)] = True
    want = run_longformer(peer, x, mask)
    assert relative_error(our_longformer(peer, x, window=window, global_tokens=mask), want) < SINGLE


def test_longformer_gradient():
    """With respect to the input, through both sets of projections."""
    peer, x = peer_longformer(8), torch.randn(1, 32, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 32, dtype=torch.bool)
    mask[0, [0, 13]] = True
    cotangent = torch.randn(1, 32, WIDTH, dtype=torch.float64)
    (want,) = torch.autograd.grad(run_longformer(peer, x, mask), x, cotangent)
    o = our_longformer(peer, x, window=8, global_tokens=(0, 13))
    (got,) = torch.autograd.grad(o, x, cotangent)
    assert relative_error(got, want) < SINGLE


def peer_bigbird(block_size, random_blocks):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, block_size=block_size, num_random_blocks=random_blocks
    )
    # in evaluation it draws nothing, and counts the first block r times more
    return randomise(BigBirdBlockSparseAttention(config, seed=0)).train()


def run_bigbird(peer, x):
    """The peer on a text filled up to whole blocks with noise, which it is told to hide."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdModel

    B, T, D = x.shape
    noise = torch.randn(B, -T % peer.block_size, D, dtype=x.dtype)
    real = torch.cat((torch.ones(B, T), torch.zeros(noise.shape[:2])), dim=1).to(x.dtype)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(real, peer.block_size)
    o = peer(
        torch.cat((x, noise), dim=1),
        band_mask=band,
        from_mask=rows,
        to_mask=columns,
        from_blocked_mask=blocked,
        to_blocked_mask=blocked,
    )[0]
    return o[:, :T]


def plan(peer, T):
    """The blocks that the peer draws for each head and each block but the first and last, [H, NB - 2, r]."""
    np.random.seed(peer.seed)
    T += -T % peer.block_size
    lengths, numbers = peer._get_rand_attn_plan(T, peer.block_size, peer.num_random_blocks)
    drawn = peer._bigbird_block_rand_mask_with_head(
        from_seq_length=T,
        to_seq_length=T,
        from_block_size=peer.block_size,
        to_block_size=peer.block_size,
        num_heads=HEADS,
        plan_from_length=lengths,
        plan_num_rand_blocks=numbers,
    )
    return torch.tensor(np.stack(drawn)).long()


@pytest.mark.parametrize(
    "T, block_size, random_blocks", ((128, 4, 2), (72, 8, 1), (60, 4, 3), (264, 8, 3), (125, 4, 2))
)
def test_bigbird(T, block_size, random_blocks):
    """At least 5 + 2 r blocks, with the peer's own draw in place of ours."""
    peer, x = peer_bigbird(block_size, random_blocks), torch.randn(2, T, WIDTH, dtype=torch.float64)
    want = run_bigbird(peer, x)
    fixed = select(T, HEADS, block_size=block_size, random_blocks=0)
    # [1, H, N - 2, r]: none comes twice, and none is seen anyway, so that a set is what the peer counts
    drawn = plan(peer, T)[None]
    assert drawn.sort(-1).values.diff(dim=-1).gt(0).all()
    assert not fixed[:, :, 1:-1].gather(3, drawn).any()
    mask = fixed.clone()
    mask[:, :, 1:-1].scatter_(3, drawn, True)
    q, k, v = heads(peer.query, peer.key, peer.value, x=x)
    o = block_sparse_attention(
        q, k, v, block_mask=mask.expand(2, -1, -1, -1), block_size=block_size, causal=False, impl="torch"
    )
    assert relative_error(o.flatten(2), want) < RTOL
    # and the draw is seen
    o = block_sparse_attention(
        q, k, v, block_mask=fixed.expand(2, -1, -1, -1), block_size=block_size, causal=False, impl="torch"
    )
    assert max_error(o.flatten(2), want) > 1e-2


def test_bigbird_draws_as_many_as_its_peer():
    """Our sets of 64 blocks, as published, are as large as the authors', row by row."""
    peer, T = peer_bigbird(4, 3), 256
    theirs = select(T, HEADS, block_size=4, random_blocks=0)
    theirs[:, :, 1:-1].scatter_(3, plan(peer, T)[None], True)
    ours = select(T, HEADS, block_size=4, random_blocks=3)
    assert torch.equal(ours.sum(-1), theirs.sum(-1))
