"""The frame by itself: configurations, rotary positions, attention, experts, sampling, weights of others."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from effattn_lite import models
from effattn_lite.layers.sliding_window import SlidingWindow
from effattn_lite.layers.softmax_attention import SoftmaxAttention
from effattn_lite.models.attention import Attention
from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.convert import load, translate
from effattn_lite.models.feed_forward import Experts, Gated
from effattn_lite.models.lm import LanguageModel
from effattn_lite.models.norm import build_norm
from effattn_lite.models.rotary import frequencies, turn
from effattn_lite.models.rows import Rows
from effattn_lite.models.sampling import sample
from effattn_lite.models.theirs import Rule
from effattn_lite.testing import max_error, relative_error

RTOL = 1e-10


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(**changes):
    settings = dict(
        name="llama", vocab=16, width=8, pattern="A", mixers={"A": Part("attention", heads=2)},
        feed_forwards={"F": Part("gated", hidden=8), ".": None},
    )  # fmt: skip
    return Config(**settings | changes)


def test_pattern_repeats_up_to_the_depth():
    window = Part("attention", heads=2, window=4)
    config = small(pattern="WWA", depth=7, feeds="F.", mixers={"A": Part("attention", heads=2), "W": window})
    assert "".join(layer.letter for layer in config.layers) == "WWAWWAW"
    assert [layer.feed is None for layer in config.layers] == [False, True] * 3 + [False]
    assert config.layers[6].mixer == window and config.layers[6].index == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(pattern="AX"), "unknown letters \\['X'\\]"),
        (dict(pattern=""), "pattern is ''"),
        (dict(feeds="G"), "feeds is 'G'"),
        (dict(placement="middle"), "placement is 'middle'"),
        (dict(width=0), "width is 0"),
        (dict(depth=0), "depth is 0"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_a_wrong_part_says_what_is_wrong():
    with pytest.raises(ValueError, match="no kind is called 'magic'"):
        LanguageModel(small(mixers={"A": Part("magic")}))
    with pytest.raises(TypeError, match="kind 'attention'.*'color'"):
        LanguageModel(small(mixers={"A": Part("attention", heads=2, color=3)}))
    with pytest.raises(ValueError, match="yarn needs it"):
        Rope(scaling="yarn", factor=4.0)
    with pytest.raises(ValueError, match="no recipe is called 'gpt9'"):
        models.build("gpt9")
    with pytest.raises(ValueError, match="no preset 'huge'"):
        models.build("llama", "huge")


def test_placements_by_hand():
    """With a linear part in place of both, each placement is its line of the table."""
    x = draw(1, 5, 8)
    for placement in ("pre", "pre_post", "post", "parallel", "post_residual"):
        parts = {"A": Part("gated", hidden=8, carry=0.5, gain=2.0)}
        feeds = {"F": Part("gated", hidden=4, carry=3.0, gain=0.25)}
        config = small(mixers=parts, feed_forwards=feeds, placement=placement, norm=Norm(bias=True))
        block = LanguageModel(config).double().blocks[0]
        for weight in block.parameters():
            torch.nn.init.normal_(weight)
        M, F = block.mixer, block.feed_forward
        norms = {name: module for name, module in block.named_children() if "norm" in name}
        a, b = norms.get("mixer_norm"), norms.get("feed_forward_norm")
        c, d = norms.get("mixer_post_norm"), norms.get("feed_forward_post_norm")
        if placement == "pre":
            y = 0.5 * x + 2 * M(a(x))
            y = 3 * y + 0.25 * F(b(y))
        elif placement == "pre_post":
            y = 0.5 * x + 2 * c(M(a(x)))
            y = 3 * y + 0.25 * d(F(b(y)))
        elif placement == "post":
            y = 0.5 * x + 2 * c(M(x))
            y = 3 * y + 0.25 * d(F(y))
        elif placement == "parallel":
            y = 3 * (0.5 * x + 2 * M(a(x))) + 0.25 * F(a(x))
        else:
            y = 0.5 * a(x) + 2 * M(a(x))
            y = 3 * b(y) + 0.25 * F(b(y))
        assert relative_error(block.prefill(x)[0], y) < RTOL, placement


def test_two_layers_can_be_one():
    config = small(pattern="AA", same={"blocks.1.mixer": "blocks.0.mixer"})
    model = LanguageModel(config)
    assert model.blocks[1].mixer is model.blocks[0].mixer
    assert model.blocks[1].feed_forward is not model.blocks[0].feed_forward


def test_norms_by_hand():
    x = draw(3, 8)
    centred = x - x.mean(-1, keepdim=True)
    for norm, want in (
        (Norm("rms", eps=0.0), x / x.square().mean(-1, keepdim=True).sqrt()),
        (Norm("layer", eps=0.0), centred / x.std(-1, keepdim=True, correction=0)),
        (Norm("rms", eps=0.5, offset=1.0), x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt()),
        (Norm("none"), x),
    ):
        assert relative_error(build_norm(norm, 8).double()(x), want) < RTOL


def test_turning_keeps_products_of_equal_distance():
    q, k, rope = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1), Rope(100.0, dims=6, adjacent=True)

    def product(i, j):
        a, b = turn(q, torch.tensor([[i]]), rope), turn(k, torch.tensor([[j]]), rope)
        return float((a * b).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), rel=1e-9)
    assert product(7, 3) != pytest.approx(product(8, 3), rel=1e-3)
    assert max_error(turn(q, torch.tensor([[9]]), rope)[..., 6:], q[..., 6:]) == 0


def test_layouts_are_permutations_of_each_other():
    x, position = draw(2, 5, 3, 8), torch.arange(5)[None]
    order = torch.arange(8).view(2, 4).T.flatten()  # (i, i + 4) side by side
    halves = turn(x, position, Rope())
    assert relative_error(turn(x[..., order], position, Rope(adjacent=True)), halves[..., order]) < RTOL


def test_stretched_wavelengths():
    base = frequencies(Rope(), 64, dtype=torch.float64)
    for scaling in ("llama3", "yarn"):
        rope = Rope(scaling=scaling, factor=8.0, context=1024, low=1.0, high=16.0)
        ratio = base / frequencies(rope, 64, dtype=torch.float64)
        turns = 1024 * base / (2 * math.pi)
        # the borders of YaRN's ramp are rounded to whole pairs
        assert ratio[turns > 32].max() == 1 and ratio[turns < 0.5].min() == pytest.approx(8.0)
        assert (ratio.diff() >= 0).all()


def test_attention_is_the_layers_of_the_package():
    x = draw(2, 45, 32)
    rope = dict(rope=Rope(10_000.0))
    for layer, options in (
        (SoftmaxAttention(32, 4, kv_heads=2), rope),
        (SlidingWindow(32, 4, window=7), rope | {"window": 7}),
        (SoftmaxAttention(32, 4, rope_theta=None), {}),
    ):
        layer = layer.double()
        ours = Attention(32, 4, kv_heads=layer.kv_heads, **options).double()
        ours.load_state_dict(layer.state_dict())
        assert relative_error(ours(x), layer(x)) < RTOL


def test_a_chunk_sees_nothing_before_it():
    x, layer = draw(1, 40, 32), Attention(32, 4, chunk=16).double()
    want = torch.cat([layer(part) for part in x.split(16, dim=1)], dim=1)
    assert relative_error(layer(x), want) < RTOL
    assert layer.prefill(x)[1]["k"].shape[1] == 40 % 16
    with pytest.raises(ValueError, match="window is 4 and chunk is 16"):
        Attention(32, 4, window=4, chunk=16)


def test_borrowed_keys_are_the_lenders():
    """A borrower with the lender's queries gives the lender's output, and keeps nothing."""
    x = draw(2, 20, 32)
    lender = Attention(32, 4, kv_heads=2, rope=Rope(), lends="kv").double()
    borrower = Attention(32, 4, kv_heads=2, rope=Rope(), borrows="kv").double()
    borrower.load_state_dict({n: w for n, w in lender.state_dict().items() if n[0] in "qo"})
    shared = {"position": torch.arange(20)[None]}
    want, _ = lender.prefill(x, shared=shared)
    got, cache = borrower.prefill(x, shared=shared)
    assert relative_error(got, want) < RTOL and not cache


def test_rows_of_their_own_lengths():
    x = draw(1, 7, 2)
    rows = Rows.extend(None, {"k": x}, torch.tensor([0, 3, 7]))
    cache = rows.keep(lambda part: part[:, -2:])
    assert cache["edges"].tolist() == [0, 2, 4] and torch.equal(cache["k"][0], x[0, [1, 2, 5, 6]])
    more = draw(2, 1, 2, seed=1)
    longer = list(Rows.extend(cache, {"k": more}))
    assert torch.equal(longer[1]["k"], torch.cat((x[:, 5:], more[1:]), dim=1))


def test_experts_by_hand():
    x = draw(2, 5, 8)
    for options in (
        {},
        dict(scores="sigmoid", weigh="input", shared=6),
        dict(normalise=True, scale=2.5, bias=True, router_bias=True, shared=6, shared_gate=True),
        dict(scores="sigmoid", balance=True, normalise=True),
    ):
        layer = Experts(8, 4, 5, 2, **options).double()
        for weight in (*layer.parameters(), *layer.buffers()):
            torch.nn.init.normal_(weight)
        want = torch.stack([torch.stack([mixture(layer, token) for token in row]) for row in x])
        assert relative_error(layer(x), want) < RTOL, options


def mixture(layer, x):
    """Every expert in full, then only those that are chosen count."""
    logits = layer.router(x)
    p = logits.softmax(-1) if layer.scores == "softmax" else logits.sigmoid()
    liked = p if layer.balance is None else p + layer.balance
    chosen = sorted(range(len(p)), key=lambda e: -liked[e].item())[: layer.top]
    y, total = torch.zeros_like(x), sum(p[e] for e in chosen) if layer.normalise else 1.0
    for e in chosen:
        expert = Gated(8, 4, bias=layer.gate_bias is not None).double()
        for name in ("gate", "up", "down"):
            proj = getattr(expert, f"{name}_proj")
            proj.weight.data = getattr(layer, name)[e]
            if proj.bias is not None:
                proj.bias.data = getattr(layer, f"{name}_bias")[e]
        weight = layer.scale * p[e] / total
        y = y + (expert(weight * x) if layer.weigh == "input" else weight * expert(x))
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x).sigmoid()
        y = y + gate * layer.shared(x)
    return y


def test_sampling():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)

    def shares(**options):
        drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    # 4000 draws: three standard deviations are below 0.025
    assert max_error(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05])) < 0.025
    assert max_error(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0])) < 0.025
    assert max_error(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0])) < 0.025
    assert max_error(shares(top_p=0.01), torch.tensor([1.0, 0, 0, 0])) == 0
    assert max_error(shares(temperature=0), torch.tensor([1.0, 0, 0, 0])) == 0
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert max_error(shares(temperature=0.5), sharp / sharp.sum()) < 0.025
    with pytest.raises(ValueError, match="top_p 0.0"):
        sample(logits, top_p=0.0)


def test_generate_stops_and_refuses():
    model = models.build("llama").eval()
    first = int(next(model.generate([[1, 2]], 1, temperature=0))[0])
    assert len(list(model.generate([[1, 2]], 9, temperature=0, stop=first))) == 1
    rows = torch.stack(list(model.generate([[1, 2], [3]], 40, seed=3, stop=5)))
    for row in rows.T.tolist():
        end = row.index(5) if 5 in row else len(row)
        assert set(row[end:]) <= {5}
    with pytest.raises(ValueError, match="at least 1 each"):
        list(model.generate([[1], []], 2))
    with pytest.raises(ValueError, match="expected equal lengths"):
        list(model.generate([[1], [2, 3]], 2, chunk=1))
    prompt = torch.arange(40)[None]
    whole, parts = (list(model.generate(prompt, 4, seed=1, chunk=chunk)) for chunk in (None, 7))
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    cache = model.prefill(torch.tensor([[1, 2]]))[1]
    with pytest.raises(ValueError, match="expected no empty text"):
        model.prefill(torch.tensor([[1]]), cu_seqlens=torch.tensor([0, 1, 1]), last=True)
    with pytest.raises(ValueError, match="a cache and cu_seqlens"):
        model.prefill(torch.tensor([[1]]), cache, cu_seqlens=torch.tensor([0, 1]))


def test_rules_miss_no_name():
    model = LanguageModel(small())
    rules = [
        Rule("e", "embedding.weight"),
        Rule("gates", ("blocks.0.feed_forward.gate_proj.weight", "blocks.0.feed_forward.up_proj.weight"),
             lambda x: x.chunk(2)),
        Rule("l.{i}.*", "blocks.{i}.*"),
        Rule("head", "head.weight"),
        Rule("n", "norm.weight"),
        Rule("buffer", None),
    ]  # fmt: skip
    theirs = {
        f"l.{n.removeprefix('blocks.')}": torch.randn(x.shape) for n, x in model.blocks.state_dict().items()
    }
    gates = [theirs.pop(f"l.0.feed_forward.{name}_proj.weight") for name in ("gate", "up")]
    theirs |= {name: torch.randn(16, 8) for name in ("e", "head")}
    theirs |= {"n": torch.randn(8), "gates": torch.cat(gates), "buffer": torch.zeros(3)}
    load(model, rules, theirs)
    assert torch.equal(model.blocks[0].feed_forward.up_proj.weight, gates[1])
    assert torch.equal(model.blocks[0].mixer.q_proj.weight, theirs["l.0.mixer.q_proj.weight"])
    with pytest.raises(ValueError, match="their names that no rule knows: odd"):
        load(model, rules, theirs | {"odd": torch.zeros(1)})
    with pytest.raises(ValueError, match="our names that no rule gives: norm.weight"):
        load(model, rules, {n: x for n, x in theirs.items() if n != "n"})
    with pytest.raises(ValueError, match="norm.weight: \\(9,\\), expected \\(8,\\)"):
        load(model, rules, theirs | {"n": torch.zeros(9)})
    with pytest.raises(ValueError, match="names that our model does not have: blocks.0.more"):
        load(model, rules, theirs | {"l.0.more": torch.zeros(1)})
    with pytest.raises(ValueError, match="have \\['a'\\] but not \\['b'\\]"):
        translate([Rule(("a", "b"), "c", torch.add)], {"a": torch.zeros(1)}, 1)


def test_the_training_loop_takes_a_model():
    """Tokens that follow each other in a circle: the loss falls from log 64 towards 0."""
    from effattn_lite.train import train

    torch.manual_seed(0)
    model = LanguageModel(replace(models.recipe("llama").PRESETS["tiny"], depth=2))

    def draw_batch(rng):
        start = rng.integers(0, 64, (16, 1))
        tokens = (start + np.arange(9)) % 64
        return tokens[:, :-1], tokens[:, 1:]

    assert train(model, draw_batch, steps=50, lr=2e-2)["loss"] < 0.5 * math.log(64)


def test_configurations_need_no_torch():
    """Every recipe can be read, and its cache weighed, where only NumPy is."""
    code = """import sys; from effattn_lite import models
for name in models.names():
    assert all(c.cache_bytes(1000) > 0 and c.layers for c in models.recipe(name).PRESETS.values()), name
print("torch" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_check_without_the_tests_compares_steps(monkeypatch, tmp_path, capsys):
    from effattn_lite.__main__ import main

    monkeypatch.setattr("effattn_lite.__main__.ROOT", tmp_path)
    assert main(["check", "gemma3"]) == 0
    assert "a step a token = all at once" in capsys.readouterr().out
