"""What is special to block streaming: its limits, and windows that begin at multiples of the block."""

import pytest
import torch

from effattn_lite.layers.block_streaming import BlockStreaming
from effattn_lite.ops import block_streaming, softmax_attention, streaming_llm
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("block_streaming", **sizes))


@pytest.mark.parametrize("sinks, window", ((3, 5), (0, 7)))
def test_reduces_to_streaming_llm(sinks, window):
    x = inputs(H=4, HKV=2)
    got = block_streaming(
        **x, sink_blocks=sinks, local_blocks=window, block_size=1, return_lse=True, impl="torch"
    )
    want = streaming_llm(**x, sinks=sinks, window=window, return_lse=True, impl="torch")
    assert relative_error(got, want) < RTOL


def test_enough_blocks_see_all():
    x = inputs()
    got = block_streaming(**x, sink_blocks=0, local_blocks=3, block_size=16, impl="torch")
    assert relative_error(got, softmax_attention(**x, impl="torch")) < RTOL


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_window_begins_at_a_block(impl, device):
    """Tokens 24 to 31 see tokens 16 and later and the first 8: the last of them no more than the first."""
    x = {n: t.float().to(device) for n, t in inputs().items()}
    options = dict(sink_blocks=1, local_blocks=2, block_size=8, impl=impl)
    before = block_streaming(**x, **options)[:, 24:32]
    x["v"][:, 8:16] = torch.randn_like(x["v"][:, 8:16])
    assert max_error(block_streaming(**x, **options)[:, 24:32], before) == 0
    for t in (0, 7, 16, 24):
        x["v"][:, t] += 1
        after = block_streaming(**x, **options)[:, 24:32]
        assert ((after - before).abs().amax((0, 2, 3)) > 1e-6).all(), t
        before = after


@pytest.mark.parametrize("sizes", (dict(T=50), dict(T=3), dict(T=130, B=1)), ids=str)
@pytest.mark.parametrize("blocks", ((0, 1, 10), (2, 3, 7), (9, 1, 16)))
def test_blocks_of_any_size(sizes, blocks):
    options = dict(zip(("sink_blocks", "local_blocks", "block_size"), blocks, strict=True))
    x = make_inputs("block_streaming", **sizes)
    want = run_reference("block_streaming", x, **options)
    assert (
        relative_error(block_streaming(**to_torch(x), **options, return_lse=True, impl="torch"), want) < RTOL
    )


def test_decoding_counts_blocks_from_the_start():
    x = inputs()
    options = dict(sink_blocks=1, local_blocks=2, block_size=8, impl="torch")
    whole = block_streaming(**x, **options)
    assert relative_error(block_streaming(x["q"][:, -3:], x["k"], x["v"], **options), whole[:, -3:]) < RTOL


def test_gradient_over_blocks():
    x = [t.requires_grad_() for t in inputs(B=1, T=7, H=2, HKV=1, K=3, V=2).values()]
    options = dict(sink_blocks=1, local_blocks=1, block_size=2, impl="torch")
    assert torch.autograd.gradcheck(lambda *x: block_streaming(*x, **options), x)


@pytest.mark.parametrize("name", ("sink_blocks", "local_blocks", "block_size"))
def test_errors(name):
    options = dict(sink_blocks=1, local_blocks=1, block_size=4) | {name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1, expected >="):
        block_streaming(**inputs(), **options)


def test_layer_in_odd_pieces():
    """Pieces that end inside blocks: whole blocks leave the cache, so the rest stays aligned."""
    layer = BlockStreaming(16, 2, sink_blocks=1, local_blocks=2, block_size=4, kv_heads=1).double()
    x, cache, parts = torch.randn(2, 41, 16, dtype=torch.float64), None, []
    for piece in x.split((3, 10, 1, 1, 9, 17), dim=1):
        y, cache = layer.prefill(piece, cache)
        parts.append(y)
        assert cache["k"].shape[1] <= 12
    assert relative_error(torch.cat(parts, dim=1), layer(x)) < RTOL


def test_layer_compiles():
    layer, x = BlockStreaming(16, 2, local_blocks=1, block_size=8), torch.randn(1, 20, 16)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6
