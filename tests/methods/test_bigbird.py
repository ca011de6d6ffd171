"""What is special to BigBird: its sets, how they are drawn, and how few steps join any two tokens."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effattn_lite.layers.bigbird import BigBird
from effattn_lite.ops import bigbird, softmax_attention
from effattn_lite.ops.bigbird import select
from effattn_lite.reference import bigbird as ours
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("bigbird", **sizes))


def test_sets_by_hand():
    """Seven blocks, the last of which is short, without random ones."""
    see = ours.select(20, 1, block_size=3, random_blocks=0)[0].astype(int)
    picture = ["".join(".x"[x] for x in row) for row in see]
    assert picture == ["xxxxxxx", "xxx...x", "xxxx..x", "x.xxx.x", "x..xxxx", "x...xxx", "xxxxxxx"]


@pytest.mark.parametrize("T", (1, 3, 12, 13, 100, 640))
@pytest.mark.parametrize("random_blocks", (0, 1, 3, 40))
def test_op_and_reference_draw_alike(T, random_blocks):
    options = dict(block_size=3, random_blocks=random_blocks, seed=5)
    mask = select(T, 4, **options)
    assert mask.shape == (1, 4, -(-T // 3), -(-T // 3))
    assert np.array_equal(mask[0].numpy(), ours.select(T, 4, **options))


def test_every_block_draws_as_many_as_it_may():
    """r beyond neighbours and global blocks; all there are, where these are fewer."""
    for r in (1, 3, 11, 12, 50):
        fixed, mask = (select(16, 3, block_size=1, random_blocks=n)[0] for n in (0, r))
        assert (mask & fixed == fixed).all()
        drawn, left = (mask & ~fixed).sum(-1), (~fixed).sum(-1)
        assert (drawn == left.clamp(max=r)).all()


def test_draw_is_fair():
    """Each free block is drawn equally often, within five standard deviations, and the heads differ."""
    heads, r = 4000, 2
    mask = select(12, heads, block_size=1, random_blocks=r, seed=3)[0]
    share = mask[:, 5].double().mean(0)
    free = torch.tensor([1, 2, 3, 7, 8, 9, 10])
    p = r / len(free)
    assert (share[free] - p).abs().max() < 5 * (p * (1 - p) / heads) ** 0.5
    assert share[[0, 4, 5, 6, 11]].eq(1).all()


def test_seed_is_all_that_decides():
    one, same, other = (select(640, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    one.fill_(False)  # what is kept is not what is given
    assert torch.equal(select(640, 2, seed=1), same)


def test_two_layers_reach_every_token():
    one = select(50, 1, block_size=1, random_blocks=0)[0, 0].long()
    assert not one.all() and (one @ one).bool().all()
    # without the global blocks random ones shorten the way that a window must walk
    inner = select(200, 1, block_size=1)[0, 0, 1:-1, 1:-1].double()
    window = torch.ones_like(inner).tril(1).triu(-1)
    assert (torch.linalg.matrix_power(inner, 10) > 0).all()
    assert not (torch.linalg.matrix_power(window, 190) > 0).all()


@pytest.mark.parametrize("heads, kv_heads, T", ((4, 2, 48), (1, 1, 1), (3, 1, 45)))
def test_reduces_to_softmax_attention(heads, kv_heads, T):
    x = inputs(H=heads, HKV=kv_heads, T=T)
    want = softmax_attention(**x, causal=False, return_lse=True, impl="torch")
    assert (
        relative_error(bigbird(**x, block_size=12, random_blocks=0, return_lse=True, impl="torch"), want)
        < RTOL
    )
    # or every other block is drawn
    got = bigbird(**x, block_size=3, random_blocks=12, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


def test_five_blocks_are_not_all():
    """One block more, and the second block misses the fourth."""
    x = inputs(T=45)
    want = softmax_attention(**x, causal=False, impl="torch")
    got = bigbird(**x, block_size=9, random_blocks=0, impl="torch")
    different = (got - want).abs().amax((0, 2, 3)) > 1e-6
    assert (different == (torch.arange(45) // 9 == 1) | (torch.arange(45) // 9 == 3)).all()


@pytest.mark.parametrize("T", (1, 2, 15, 40))
@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (3, 3), (3, 1), (14, 2)))
@pytest.mark.parametrize(
    "options",
    (
        {"block_size": 1, "random_blocks": 2},
        {"block_size": 4, "random_blocks": 1, "seed": 9},
        {"block_size": 7, "random_blocks": 0},
        {},
    ),
    ids=str,
)
def test_any_blocks_and_heads(options, heads, kv_heads, T):
    x = make_inputs("bigbird", T=T, H=heads, HKV=kv_heads, B=2, K=4, V=5)
    want = run_reference("bigbird", x, **options)
    got = bigbird(**to_torch(x), **options, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL
    assert relative_error(run_reference("bigbird", x, form="blockwise", **options), want) < RTOL


def test_gradient():
    """With blocks that do not see all."""
    x = [t.requires_grad_() for t in inputs(B=1, T=13, H=2, HKV=1, K=2, V=2).values()]
    options = dict(block_size=2, random_blocks=1, return_lse=True, impl="torch")
    assert torch.autograd.gradcheck(lambda *x: bigbird(*x, **options), x)


def test_equals_masked_dense_attention():
    """torch's own attention under the mask of the blocks."""
    x, block = inputs(T=45, H=3), torch.arange(45) // 4
    see = select(45, 3, block_size=4, random_blocks=2)[0][:, block[:, None], block]
    q, k, v = (t.transpose(1, 2) for t in x.values())
    want = scaled_dot_product_attention(q, k, v, attn_mask=see).transpose(1, 2)
    assert relative_error(bigbird(**x, block_size=4, random_blocks=2, impl="torch"), want) < RTOL


def test_cost_is_linear():
    """Published sizes, 64 tokens a block and 3 random ones: twice the text, twice the work, or nearly."""
    sizes = dict(form="blockwise", B=1, H=12, K=64, V=64)
    short, long = (ours.cost(T=T, **sizes)["flops"] for T in (4096, 8192))
    assert 1.95 < long / short < 2.05
    full = ours.cost(T=4096, **sizes | {"form": "quadratic"})["flops"]
    assert 0.13 < short / full < 0.16


@pytest.mark.parametrize(
    "options, match",
    (
        ({"block_size": 0}, "block_size is 0, expected >= 1"),
        ({"random_blocks": -1}, "random_blocks is -1, expected >= 0"),
        ({"seed": -2}, "seed is -2, expected >= 0"),
    ),
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        bigbird(**inputs(), **options)
    with pytest.raises(ValueError, match=match):
        select(48, 2, **options)


def test_layer_draws_by_its_seed():
    x, layers = (
        torch.randn(1, 40, 16),
        [BigBird(16, 4, block_size=4, seed=seed, kv_heads=2) for seed in (0, 0, 1)],
    )
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    a, b, c = (layer(x) for layer in layers)
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_layer_compiles():
    layer, x = BigBird(16, 2, block_size=3), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
