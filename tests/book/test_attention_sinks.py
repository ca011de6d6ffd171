"""What the chapter rests on: the parallel forward pass is the rolling cache; exercises and figure."""

import json
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch

from effattn_lite import exercises
from effattn_lite.explore import AttentionSinks

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")


@pytest.fixture
def smollm2(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    import smollm2

    return smollm2


def tiny(smollm2, *, layers=3, heads=4, kv_heads=2, head_dim=8, width=16, vocabulary=40):
    """A Llama of random weights, float64, loud enough that attention is far from uniform."""
    torch.manual_seed(0)
    shapes = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (width,), "ffn_norm": (width,),
            "attn_q": (heads * head_dim, width), "attn_k": (kv_heads * head_dim, width),
            "attn_v": (kv_heads * head_dim, width), "attn_output": (width, heads * head_dim),
            "ffn_gate": (24, width), "ffn_up": (24, width), "ffn_down": (width, 24),
        }.items()}  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return smollm2.Model(weights, layers, heads, kv_heads, 1e4, 1e-5)


def decode(smollm2, model, ids, sinks, window, block, silent=False):
    """Hidden states [T, D], token by token: the cache keeps unrotated keys and rotates them by place."""
    w, norm, out = model.weights, smollm2.rms_norm, []
    caches = [[] for _ in range(model.layers)]
    for t, token in enumerate(ids):
        x = w["token_embd.weight"][token]
        for i, cache in enumerate(caches):
            p = f"blk.{i}."
            h = norm(x, w[p + "attn_norm.weight"], model.eps)
            q = (w[p + "attn_q.weight"] @ h).view(model.heads, -1)
            k, v = ((w[p + f"attn_{n}.weight"] @ h).view(model.kv_heads, -1) for n in "kv")
            cache.append((t, k, v))
            oldest = (t // block - window // block + 1) * block
            cache[:] = [entry for entry in cache if entry[0] < sinks or entry[0] >= oldest]
            place = torch.arange(len(cache))
            keys = smollm2.rotate(torch.stack([k for _, k, _ in cache]), place, model.theta)
            values = torch.stack([v * (not silent or j >= oldest) for j, _, v in cache])
            q = smollm2.rotate(q[None], place[-1:], model.theta)[0]
            group = model.heads // model.kv_heads
            heads = [
                (keys[:, n // group] @ q[n] / q.shape[1] ** 0.5).softmax(0) @ values[:, n // group]
                for n in range(model.heads)
            ]
            x = x + w[p + "attn_output.weight"] @ torch.cat(heads)
            h = norm(x, w[p + "ffn_norm.weight"], model.eps)
            gate = torch.nn.functional.silu(w[p + "ffn_gate.weight"] @ h)
            x = x + w[p + "ffn_down.weight"] @ (gate * (w[p + "ffn_up.weight"] @ h))
        out.append(norm(x, w["output_norm.weight"], model.eps))
    return torch.stack(out)


@pytest.mark.parametrize("chunk", (5, 64))
@pytest.mark.parametrize(
    "sinks, window, block", [(0, 6, 1), (1, 6, 1), (4, 6, 1), (4, 1, 1), (4, 8, 4), (0, 4, 4), (4, 99, 1)]
)
def test_parallel_is_rolling(smollm2, sinks, window, block, chunk):
    model = tiny(smollm2)
    ids = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(1))
    pattern = smollm2.Pattern(sinks=sinks, window=window, block=block)
    x, _, _ = smollm2.forward(model, ids, pattern, chunk=chunk)
    # a misplaced sink moves the hidden states by more than 1e-2
    np.testing.assert_allclose(x, decode(smollm2, model, ids, sinks, window, block), rtol=1e-8, atol=1e-8)


def test_silent_sinks_keep_their_weight_alone(smollm2):
    model = tiny(smollm2)
    ids = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(1))
    x, _, _ = smollm2.forward(model, ids, smollm2.Pattern(sinks=3, window=6, silent=True), chunk=5)
    np.testing.assert_allclose(x, decode(smollm2, model, ids, 3, 6, 1, silent=True), rtol=1e-8, atol=1e-8)


def test_true_positions_are_another_thing(smollm2):
    model = tiny(smollm2)
    ids = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(1))
    kept = [smollm2.forward(model, ids, smollm2.Pattern(4, 6, reindex=r))[0] for r in (True, False)]
    assert (kept[0] - kept[1]).abs().max() > 1e-2


def test_chunks_of_queries_do_not_matter_and_mass_is_a_share(smollm2):
    model = tiny(smollm2)
    ids = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(1))
    a, mass, taps = smollm2.forward(model, ids, probe=37, taps=(1,))
    b, _, _ = smollm2.forward(model, ids, chunk=3)
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mass, 1, rtol=1e-12)
    assert taps[1][0].shape == (37, 4, 8)


def places(t, *, sinks, window):
    slot = np.arange(min(t + 1, sinks + window))
    oldest = max(t - window + 1, sinks)
    return np.where(slot < sinks, slot, sinks + (slot - oldest) % window)


def weights(x, b):
    m = max(x.max(), b)
    p = np.exp(x - m)
    return p / (np.exp(b - m) + p.sum())


@pytest.mark.parametrize(
    "number, right, wrong, said",
    [
        (1, (10, 30 * 3 * 128 * 2 * 1024, 13, 1023), (10, 30 * 3 * 64 * 2 * 1024, 13, 1023), "values"),
        (3, places, lambda t, *, sinks, window: np.arange(min(t + 1, sinks + window)), "oldest"),
        (4, weights, lambda x, b: np.exp(x) / (np.exp(b) + np.exp(x).sum()), "largest"),
    ],
)
def test_exercises(number, right, wrong, said):
    name = f"sparse/attention_sinks/{number}"
    assert exercises.check(name, right)
    verdict = exercises.check(name, wrong)
    assert not verdict and verdict.started and said in verdict.words
    assert not exercises.check(name, (..., ...) if number == 1 else lambda *a, **k: None).started


def test_figure_state_is_small_and_true():
    state = AttentionSinks().state
    assert len(json.dumps(state)) < 150_000
    T = len(state["words"])
    for head in state["heads"]:
        levels = np.frombuffer(b64decode(head["levels"]), np.uint8)
        assert levels.size == T * (T + 1) // 2
        p = np.zeros((T, T))
        p[np.tril_indices(T)] = np.exp(-state["nats"] * (levels / 255) ** 2)
        # half a level is 0.03 nats at a weight of a half, 0.06 nats at one of 5 %
        np.testing.assert_allclose(p.sum(1), 1, atol=0.05)
