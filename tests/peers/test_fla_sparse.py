"""Outside truth for trained sparsity: flash-linear-attention's plain loops over summaries and blocks.

Its spans are as long as its blocks and follow each other without overlap; the window it leaves to another
package. What is left is compared branch by branch.
"""

import pytest
import torch

from effattn_lite.ops import moba, nsa
from effattn_lite.ops.moba import select as route
from effattn_lite.ops.nsa import compress, select
from effattn_lite.testing import make_inputs, relative_error, to_torch

naive = pytest.importorskip("fla.ops.nsa.naive", reason="flash-linear-attention is not installed")

BLOCK = 8
SPANS = dict(cmp_size=BLOCK, cmp_stride=BLOCK)
SIZES = (dict(B=2, T=63, H=3, K=16, V=16), dict(B=1, T=100, H=32, HKV=2, K=16, V=16))


def draw(sizes, device, **gates):
    """float32 inputs of NSA, with 1 for a named gate and 0 for the others."""
    x = to_torch(make_inputs("nsa", dtype="float32", **sizes), dtype="float32", device=device)
    return x | {g: torch.full_like(x[g], gates.get(g, 0.0)) for g in ("g_cmp", "g_slc", "g_win")}


def summaries(x):
    """Means of whole spans, and one more that no query sees: the loop wants a span for the last block too."""
    means = compress(x, **SPANS)
    return torch.cat((means, torch.zeros_like(means[:, :1])), dim=1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_compressed_branch(sizes, device):
    x = draw(sizes, device, g_cmp=1.0)
    want, _ = naive.naive_nsa_compression(x["q"], summaries(x["k"]), summaries(x["v"]), BLOCK, 16**-0.5)
    assert relative_error(nsa(**x, **SPANS, block_size=BLOCK), want) < 2e-5


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("top_n", (3, 5))
def test_selected_blocks(sizes, top_n, device):
    x = draw(sizes, device)
    want = naive.naive_nsa_topk(x["q"], summaries(x["k"]), top_n, BLOCK, 16**-0.5)
    got = select(x["q"], x["k"], block_size=BLOCK, top_n=top_n, **SPANS)
    assert torch.equal(got.long().sort(-1)[0], want.sort(-1)[0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_selected_branch(sizes, device):
    x = draw(sizes, device, g_slc=1.0)
    blocks = select(x["q"], x["k"], block_size=BLOCK, top_n=5, **SPANS)
    want = naive.naive_nsa_selection(x["q"], x["k"], x["v"], blocks.long(), BLOCK)
    assert relative_error(nsa(**x, **SPANS, block_size=BLOCK, top_n=5), want) < 2e-5


@pytest.mark.parametrize("sizes", SIZES[:1], ids=str)
def test_routed_blocks(sizes, device):
    """MoBA's attention is the selected branch with a set a query head; its choice is checked elsewhere."""
    q, k, v = (draw(sizes, device)[name] for name in "qkv")
    blocks = route(q, k, block_size=BLOCK, top_k=3)
    want = naive.naive_nsa_selection(q, k, v, blocks.long(), BLOCK)
    assert relative_error(moba(q, k, v, block_size=BLOCK, top_k=3), want) < 2e-5
