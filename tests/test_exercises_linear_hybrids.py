"""The checkers of models/linear_hybrids, and the figure's prices against the package's models."""

from dataclasses import replace

import numpy as np
import pytest

from effattn_lite import models
from effattn_lite.exercises import check
from effattn_lite.explore import HybridComposer
from effattn_lite.explore.hybrid_composer import JAMBA, prices

CHAPTER = "models/linear_hybrids"


def test_by_hand():
    answer = (8192, 10_485_760, 256, 5.993, 4.75)
    assert check(f"{CHAPTER}/1", answer)
    assert not check(f"{CHAPTER}/1", (...,) * 5).started
    for place, word in enumerate(("token_bytes", "state_bytes", "even", "times", "alpha")):
        wrong = [x * (1.5 if i == place else 1) for i, x in enumerate(answer)]
        verdict = check(f"{CHAPTER}/1", tuple(wrong))
        assert not verdict and f"`{word}`" in verdict.words
    assert "five" in check(f"{CHAPTER}/1", answer[:4]).words


def exchanged(tokens, a=1, b=3):
    other = tokens.copy()
    other[[a, b]] = tokens[[b, a]]
    return other


def test_twin():
    name = f"{CHAPTER}/2"
    assert check(name, exchanged)
    assert not check(name, lambda tokens: None).started
    assert "as well" in check(name, lambda tokens: tokens).words
    assert "a value where a key belongs" in check(name, lambda tokens: exchanged(tokens, 2, 3)).words
    assert "asks for" in check(name, lambda tokens: exchanged(tokens, 2, -1)).words
    assert "other tokens" in check(name, lambda tokens: np.append(tokens[:-2], [11, tokens[-1]])).words
    assert "integers" in check(name, lambda tokens: tokens[:-1]).words


def ledger(pattern, depth, length, prices, *, cut=True, windows=True):
    layers = (pattern * depth)[:depth] if cut else pattern * (depth // len(pattern))
    total = 0
    for letter in layers:
        start, each, most = prices[letter]
        total += start + each * (min(length, most) if most and windows else length)
    return total


def test_ledger():
    name = f"{CHAPTER}/3"
    assert check(name, ledger)
    assert not check(name, lambda *_: None).started
    assert "repeated" in check(name, lambda *a: ledger(*a, cut=False)).words
    assert "window" in check(name, lambda *a: ledger(*a, windows=False)).words


def router_gradient(logits, worth, top, normalise):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    chosen = np.zeros(len(p))
    chosen[np.argsort(-p)[:top]] = 1
    if normalise:
        p = p * chosen / (p @ chosen)
    return p * (chosen * worth - (p * chosen) @ worth)


def test_router_gradient():
    name = f"{CHAPTER}/4"
    assert check(name, router_gradient)
    assert not check(name, lambda *_: None).started
    assert "chosen logits alone" in check(name, lambda z, w, top, n: router_gradient(z, w, top, False)).words
    hidden = check(name, lambda z, w, top, n: np.where(np.argsort(np.argsort(-z)) < top,
                                                       router_gradient(z, w, top, n), 0))  # fmt: skip
    assert "over all experts" in hidden.words


def test_norm_add():
    pytest.importorskip("triton", reason="triton is not installed")
    import triton
    import triton.language as tl

    @triton.jit
    def norm_add(x_ptr, y_ptr, weight_ptr, out_ptr, alpha, beta, eps, D, BLOCK: tl.constexpr):
        i_row, o_d = tl.program_id(0), tl.arange(0, BLOCK)
        m_d = o_d < D
        b_x = tl.load(x_ptr + i_row * D + o_d, mask=m_d, other=0.0)
        b_y = tl.load(y_ptr + i_row * D + o_d, mask=m_d, other=0.0)
        b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0)
        b_z = b_w * b_x / tl.sqrt(tl.sum(b_x * b_x) / D + eps)
        tl.store(out_ptr + i_row * D + o_d, alpha * b_z + beta * b_y, mask=m_d)

    @triton.jit
    def by_block(x_ptr, y_ptr, weight_ptr, out_ptr, alpha, beta, eps, D, BLOCK: tl.constexpr):
        i_row, o_d = tl.program_id(0), tl.arange(0, BLOCK)
        m_d = o_d < D
        b_x = tl.load(x_ptr + i_row * D + o_d, mask=m_d, other=0.0)
        b_y = tl.load(y_ptr + i_row * D + o_d, mask=m_d, other=0.0)
        b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0)
        b_z = b_w * b_x / tl.sqrt(tl.sum(b_x * b_x) / BLOCK + eps)
        tl.store(out_ptr + i_row * D + o_d, alpha * b_z + beta * b_y, mask=m_d)

    @triton.jit
    def spills(x_ptr, y_ptr, weight_ptr, out_ptr, alpha, beta, eps, D, BLOCK: tl.constexpr):
        o_d = tl.arange(0, BLOCK)
        tl.store(out_ptr + tl.program_id(0) * D + o_d, o_d * 1.0)

    @triton.jit
    def nothing(x_ptr, y_ptr, weight_ptr, out_ptr, alpha, beta, eps, D, BLOCK: tl.constexpr):
        pass

    name = f"{CHAPTER}/5"
    assert check(name, norm_add)
    assert "not by BLOCK" in check(name, by_block).words
    assert not check(name, spills)
    assert not check(name, nothing).started and not check(name, lambda: 0).started


def count(part, *, width=4096, place=(0, 32)):
    """Weights of a part and its norm."""
    import torch

    from effattn_lite.models.kinds import build_part

    with torch.device("meta"):
        return width + sum(x.numel() for x in build_part(width, part, place=place).parameters())


def test_figure_has_the_prices_of_the_models():
    from effattn_lite.models.config import Part
    from effattn_lite.models.kinds import held

    jamba, found = models.recipe("jamba").PRESETS["52b"], prices(**JAMBA)
    parts = jamba.mixers | jamba.feed_forwards | {
        "W": Part("attention", heads=32, kv_heads=8, window=4096), "L": Part("lightning", heads=32),
    }  # fmt: skip
    assert set(parts) == set(found)
    for letter, part in parts.items():
        price = found[letter]
        assert price["weights"] == count(part), letter
        for length in (0, 1, 5000):
            seen = min(length, price["sees"]) if price["sees"] else length
            assert price["bytes"] + seen * price["bytes_token"] == held(4096, part, length).bytes(2), letter
    # a token meets 2 of 16 experts
    assert found["E"]["weights"] - found["E"]["used"] == 14 * 3 * 4096 * 14_336
    assert found["F"]["flops"] == 2 * 3 * 4096 * 14_336
    assert found["A"]["flops_token"] == 4 * 32 * 128


def test_figure_is_jamba():
    state = HybridComposer().state
    total = 4 * sum(state["prices"][x]["weights"] for x in state["pattern"] + state["feeds"]) + state["ends"]
    model = models.build("jamba", "52b", device="meta")
    assert total == sum(x.numel() for x in model.parameters())
    size = 4 * sum(p["bytes"] + state["context"] * p["bytes_token"]
                   for p in map(state["prices"].get, state["pattern"]))  # fmt: skip
    assert size + 8 == model.config.cache_bytes(state["context"], itemsize=2)
    for wrong in (dict(pattern="MA"), dict(pattern="MMMMAMMX"), dict(feeds="Q"), dict(context=1000)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HybridComposer(**wrong)


def test_the_surveys_block_is_another_model():
    """Section 4.2 read as printed, eight layers of Mamba and one more, is no model of 52 billion weights."""
    jamba = models.recipe("jamba").PRESETS["52b"]
    parts = jamba.mixers | jamba.feed_forwards

    def weights(pattern):
        config = replace(jamba, pattern=pattern, depth=4 * len(pattern))
        layers = [part for layer in config.layers for part in (layer.mixer, layer.feed)]
        sizes = {letter: count(part) for letter, part in parts.items()}
        by_part = {id(part): sizes[letter] for letter, part in parts.items()}
        return (2 * 65_536 * 4096 + 4096 + sum(by_part[id(part)] for part in layers)) / 1e9

    assert weights("MMMMAMMM") == pytest.approx(51.57, abs=0.01)
    assert weights("MMMMAMMMM") > 57
