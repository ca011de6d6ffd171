"""The bench on sparse methods: the pairs they see, FlexAttention's masks, bytes of decoding, break-even."""

import importlib
import inspect
import math

import numpy as np
import pytest
import torch

from effattn_lite.bench import cached, peers, record, roofline, suite
from effattn_lite.bench.__main__ import main
from effattn_lite.bench.arguments import arguments_of
from effattn_lite.bench.break_even import break_even
from effattn_lite.bench.flex import block_mask_of
from effattn_lite.bench.rows import has_kernel, row_of
from effattn_lite.bench.seen import SEEN, SIDE, seen_of, tally
from effattn_lite.ops.cache import KVCache
from effattn_lite.ops.quest import quest

CASES = [(name, options) for name in SEEN for options in row_of(name).options]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]


def arguments(name, options, T, *, HKV=2):
    sizes = dict(B=2, T=T, H=4, HKV=HKV, HV=4, K=16, V=8, D=8, M=8)
    # the second filter of SpargeAttn takes values away from pairs that it has weighed
    options = dict(options) | ({"skip": -math.inf} if "skip" in options else {})
    return arguments_of(suite.tensors_of(name, sizes, dtype="float64", device="cpu"), options)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_pairs_are_those_of_the_op(name, options):
    """With the identity for values, o is the weights: above 0 exactly where a pair is seen."""
    T = 63
    found = arguments(name, options, T)
    for tensor in ("v", "v_global"):
        if tensor in found:
            found[tensor] = torch.eye(T, dtype=torch.float64)[None, :, None].expand(2, T, 2, T).contiguous()
    more = {"g_cmp": 0.0, "g_slc": 1.0, "g_win": 0.0}
    found |= {gate: torch.full_like(found[gate], value) for gate, value in more.items() if gate in found}
    weights = suite.forward_of(name, found, {}, impl="torch")().transpose(1, 2)  # [B, H, T, T]
    seen, t = seen_of(name, found), torch.arange(T)
    b, h = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    see = seen.see(b, h, t[:, None], t).expand(2, 4, T, T)
    assert torch.equal(weights > 0, see)
    assert tally(seen, found["q"]).sum() == see.sum()
    assert 0 < see.sum() < see.numel() // (2 if seen.causal else 1), "a case that leaves nothing out"


def test_further_branches_of_nsa():
    options = {"block_size": 8, "top_n": 4, "window": 5, "cmp_size": 8, "cmp_stride": 4}
    seen = seen_of("nsa", arguments("nsa", options, 30))
    t = np.arange(30)
    spans = sum((4 * i + 7 <= t).sum() for i in range(6))
    window = ((t[:, None] >= t) & (t[:, None] - t < 5)).sum()
    assert seen.more == 2 * 4 * (spans + window)


@pytest.mark.parametrize("T", [SIDE, 300, 3 * SIDE])
@pytest.mark.parametrize(
    "name", ["block_sparse_attention", "flexprefill", "xattention", "longnet", "bigbird"]
)
def test_masks_of_flex_attention(name, T):
    """What its kernel does with the mask, a block after the other, is what is seen."""
    options = {
        "block_sparse_attention": {"block_size": SIDE, "share": 0.4},
        "flexprefill": {"gamma": 0.2, "min_budget": 1, "block_size": SIDE},
        "xattention": {"threshold": 0.3, "stride": 8, "block_size": SIDE},
        "longnet": {"segments": (64, 256), "dilations": (1, 3)},
        "bigbird": {"block_size": 16, "random_blocks": 2},
    }[name]
    found = arguments(name, options, T)
    seen = seen_of(name, found)
    assert seen.whole == (options.get("block_size") == SIDE)
    mask = block_mask_of(seen, tally(seen, found["q"]), T)
    see, NB = torch.zeros(2, 4, T, T, dtype=torch.bool), -(-T // SIDE)
    for b, h, i in np.ndindex(2, 4, NB):
        t = torch.arange(i * SIDE, min(i * SIDE + SIDE, T))[:, None]
        for counts, index, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            for n in index[b, h, i, : counts[b, h, i]].tolist():
                j = torch.arange(n * SIDE, min(n * SIDE + SIDE, T))
                see[b, h, t, j] = (
                    torch.ones(len(t), len(j), dtype=torch.bool) if whole else mask.mask_mod(b, h, t, j)
                )
    b, h, t = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None], torch.arange(T)
    assert torch.equal(see, seen.see(b, h, t[:, None], t).expand_as(see))


def test_ideal_takes_the_counted_pairs():
    sizes = dict(B=2, T=300, H=4, HKV=2, K=16, V=8)
    need = roofline.ideal("moba", sizes, {"block_size": 8, "top_k": 3}, seen=1000, backward=True)
    assert need["flops"] == 3.5 * 1000 * 2 * (16 + 8)
    assert need["bytes"] == 3 * 2 * 2 * 300 * (4 * 16 + 2 * 16 + 2 * 8 + 4 * 8)
    one, two = (roofline.ideal(name, sizes, {}, seen=10)["bytes"] for name in ("bigbird", "longformer"))
    assert two - one == 2 * 2 * 300 * 2 * (16 + 8), "of q_global a few rows are read"


def test_random_sets_have_their_share():
    sizes = dict(B=1, T=2048, H=3, HKV=3, HV=3, K=8, V=8, D=8, M=8)
    inputs = suite.tensors_of("block_sparse_attention", sizes, dtype="float32", device="cpu")
    mask = arguments_of(inputs, {"block_size": 16, "share": 0.125})["block_mask"]
    assert mask.diagonal(dim1=2, dim2=3).all() and not mask.triu(1).any()
    assert mask.sum() / (3 * 128 * 129 / 2) == pytest.approx(0.125, rel=0.01)
    assert not torch.equal(mask[:, 0], mask[:, 1])


def test_topics_carry_the_weight():
    sizes = dict(B=1, T=2048, H=4, HKV=2, HV=4, K=64, V=8, D=8, M=8)
    made = suite.tensors_of("xattention", sizes, dtype="float32", device="cpu")
    k = made["k"].repeat_interleave(2, dim=2)
    p = torch.einsum("bthk,bjhk->bhtj", made["q"], k).mul(64**-0.5).softmax(-1)
    blocks = (
        p.unflatten(3, (16, 128)).sum(-1).unflatten(2, (16, 128)).mean(3)
    )  # [B, H, 16, 16], rows sum to 1
    top = blocks.sort(dim=-1, descending=True)[0].cumsum(-1)
    assert top[..., 7].mean() > 0.99, "spans of one topic in eight, twice 128 tokens long"


@pytest.mark.parametrize("name", cached.FEATURES)
def test_bytes_of_decoding(name):
    """Two query heads of a key head that choose alike read once; the whole cache is the most."""
    rng, T, K, V = torch.Generator().manual_seed(0), 40, 16, 8
    k, v = torch.randn(1, T, 2, K, generator=rng), torch.randn(1, T, 2, V, generator=rng)
    q = torch.randn(1, 2, K, generator=rng).repeat_interleave(2, dim=1)
    options, tokens, features = {
        "quest": ({"budget": 12, "page_size": 4}, 12, 10 * 2 * K),
        "resa": ({"ratio": 0.3, "min_pages": 2, "page_size": 4}, 12, 10 * 2 * K),
        "double_sparsity": ({"channels": (1, 4, 6), "budget": 9}, 9, T * 3),
    }[name]
    numbers = 2 * (tokens * (K + V) + features) + 4 * (K + V)
    assert cached.reads(name, q, KVCache(k, v), options) == 4 * numbers
    if name != "resa":  # its groups choose together
        other = q.clone()
        other[:, 1] *= -1
        more = cached.reads(name, other, KVCache(k, v), options)
        assert 4 * numbers < more <= 4 * (numbers + tokens * (K + V))


def test_a_page_cut_short_is_not_read_whole():
    q, k, v = torch.ones(1, 1, 4), torch.ones(1, 10, 1, 4), torch.ones(1, 10, 1, 4)
    options = {"budget": 100, "page_size": 4}
    assert cached.reads("quest", q, KVCache(k, v), options) == 4 * (10 * 8 + 2 * 8 + 8)
    assert quest(q, KVCache(k, v), **options).shape == (1, 1, 4)


def row(T, impl, ms, which="forward", **options):
    return {
        "op": "moba", "impl": impl, "options": options, "shape": {"B": 1, "T": T}, "dtype": "bfloat16",
        "pass": which, "ms": ms, "floor_ms": None, "peak_mib": None,
    }  # fmt: skip


DENSE = "SDPA cuDNN, all earlier tokens"


@pytest.mark.parametrize(
    "ours, T",
    [([1, 3, 8], 2048), ([3, 3, 8], 4096), ([1, 5, 8], 8192), ([1, 3, 17], None), ([2, 4, 16], None)],
    ids=["always", "from the second", "after a lapse", "not at the end", "a tie is no win"],
)
def test_break_even(ours, T):
    rows = []
    for n, ms, dense in zip((2048, 4096, 8192), ours, (2, 4, 16), strict=True):
        rows += [row(n, "triton", ms), row(n, DENSE, dense), row(n, DENSE.replace("cuDNN", "other"), 20)]
        # neither dense attention nor of this set of options, or pass
        rows += [row(n, "FlexAttention", 0.1), row(n, "torch", 0.1), row(n, DENSE, 0.1, top_k=3)]
        rows += [row(n, DENSE, 0.1, which="forward+backward")]
    (found,) = break_even(rows[::-1])
    assert found["T"] == T
    assert found["grid"] == [2048, 4096, 8192]
    assert found["ratios"] == [dense / ms for dense, ms in zip((2, 4, 16), ours, strict=True)]


def test_break_even_without_kernel_or_rival():
    assert break_even([row(2048, "torch", 1), row(2048, DENSE, 2)])[0]["T"] == 2048
    assert (
        break_even([row(2048, "triton", 1), row(4096, DENSE, 2), {"task": "recall", "accuracy": 1.0}]) == []
    )


def test_labels_of_dense_attention():
    """`break_even` finds dense attention by its label: that of what computes all tokens, and no other."""
    q = torch.randn(1, 8, 2, 4)
    for causal in (True, False):
        labels = peers._dense_peers(q, q, q, causal=causal, exact=False)
        rows = [row(8, "triton", 1.0), *(row(8, label, 2.0) for label in labels)]
        assert len(labels) == 2 and break_even(rows)[0]["ratios"] == [2.0]
    assert not break_even(
        [
            row(8, "triton", 1.0),
            *(row(8, x, 2.0) for x in peers._dense_peers(q, q, q, causal=True, exact=True)),
        ]
    )


def test_several_methods_in_one_process(tmp_path, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(record, "write", kept.append)
    assert main(["moba", "quest", "--length", "32", "--length", "64", "--dtype", "float32", "--record"]) == 0
    for made in kept:
        record.check(made)
    last = {made["name"]: made for made in kept}
    assert set(last) == {"moba", "quest"}
    assert {r["shape"]["T"] for r in last["quest"]["rows"]} == {32, 64}
    assert all(0 < r["share"] <= 1 for r in last["moba"]["rows"])
    assert (
        last["moba"]["command"]
        == "python -m effattn_lite bench moba --length 32 --length 64 --dtype float32 --record"
    )
    assert "sees" in capsys.readouterr().out


def test_warming_up_runs_forward_and_backward(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(suite, "_once", lambda *args, once=suite._once: runs.append(once(*args)))
    assert main(["moba", "xattention", "resa", "--length", "32", "--warm"]) == 0
    assert len(runs) == 2, "the cache methods run one token instead"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", suite.SPARSE_OPTIONS)
def test_options_for_a_gpu_are_the_op_s(name):
    op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)
    known = {*inspect.signature(op).parameters, "share", "r"}
    for options in suite.options_of(name, "cuda"):
        assert set(options) <= known
    assert (name in SEEN) != (name in cached.FEATURES), "pairs or bytes, one of them is counted"


def test_methods_without_kernel_or_entry():
    assert has_kernel("block_sparse_attention") and not has_kernel("logsparse")
    assert seen_of("retnet", {}) is None
