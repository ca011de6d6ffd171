"""Laws of the models: three calls, one function; caches as long as the formula says; float64 on the CPU."""

import pytest
import torch

from effattn_lite import models
from effattn_lite.models.attention import Attention
from effattn_lite.models.lm import LanguageModel
from effattn_lite.testing import max_error, relative_error

RTOL = 1e-10
TOKENS = 40

# every recipe's "tiny", and further tiny presets where one has variants
CASES = [
    name if preset == "tiny" else f"{name}/{preset}"
    for name in models.names()
    for preset in models.presets(name)
    if preset.startswith("tiny")
]
ALL = pytest.mark.parametrize("name", CASES)


def build(name):
    """The tiny model in float64, every weight off its first value."""
    torch.manual_seed(0)
    recipe, _, preset = name.partition("/")
    model = models.build(recipe, preset or "tiny", dtype=torch.float64).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def text(model, rows=2, length=TOKENS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab, (rows, length), generator=generator)


@pytest.mark.parametrize("name", models.names())
def test_presets_are_of_this_name(name):
    presets = models.recipe(name).PRESETS
    assert "tiny" in presets and all(config.name == name for config in presets.values())


@ALL
@torch.no_grad()
def test_whole_is_chunks_is_steps(name):
    model = build(name)
    tokens = text(model)
    want = model(tokens)
    assert want.shape == (*tokens.shape, model.config.vocab)
    for sizes in ((17, 23), (5, 1, 30, 4)):
        parts, cache = [], None
        for part in tokens.split(sizes, dim=1):
            logits, cache = model.prefill(part, cache)
            parts.append(logits)
        assert relative_error(torch.cat(parts, dim=1), want) < RTOL
    parts, halfway = [], None
    for token in tokens.unbind(1):
        logits, halfway = model.step(token, halfway)
        parts.append(logits)
    assert relative_error(torch.stack(parts, dim=1), want) < RTOL
    assert relative_error(model.step(tokens[:, 0], halfway)[0], model.step(tokens[:, 0], cache)[0]) < RTOL


@ALL
@torch.no_grad()
def test_causality(name):
    model, t = build(name), 27
    tokens = text(model)
    other = tokens.clone()
    other[:, t] = (tokens[:, t] + 1) % model.config.vocab
    before, after = model(tokens), model(other)
    assert relative_error(after[:, :t], before[:, :t]) < RTOL
    assert max_error(after[:, t], before[:, t]) > 1e-6


@ALL
@torch.no_grad()
def test_packed_texts_are_texts_alone(name):
    model, edges = build(name), [0, 11, 12, 12, 40]
    tokens = text(model, rows=1)
    packed = model(tokens, cu_seqlens=torch.tensor(edges))
    alone = [model(tokens[:, a:b]) for a, b in zip(edges, edges[1:], strict=False) if a < b]
    assert relative_error(packed, torch.cat(alone, dim=1)) < RTOL


@ALL
@torch.no_grad()
def test_unequal_prompts_go_on_together(name):
    """One packed prefill, then steps and a chunk of all rows: each row is its own text alone."""
    model, lengths = build(name), [13, 1, 20]
    tokens = text(model, rows=3)
    packed = torch.cat([row[:n] for row, n in zip(tokens, lengths, strict=True)])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    logits, cache = model.prefill(packed, cu_seqlens=edges, last=True)
    more = torch.stack([row[n : n + 6] for row, n in zip(tokens, lengths, strict=True)])
    parts = [logits]
    for token in more[:, :4].unbind(1):
        logits, cache = model.step(token, cache)
        parts.append(logits)
    logits, cache = model.prefill(more[:, 4:], cache)
    got = torch.cat((torch.stack(parts, dim=1), logits), dim=1)
    for i, n in enumerate(lengths):
        assert relative_error(got[i : i + 1], model(tokens[i : i + 1, : n + 6])[:, n - 1 :]) < RTOL
    assert cache["length"].tolist() == [n + 6 for n in lengths]


@ALL
@torch.no_grad()
def test_cache_bytes(name):
    model = build(name)
    config, tokens = model.config, text(model, rows=3)
    for length in (1, 7, 16, TOKENS):
        cache = model.prefill(tokens[:, :length])[1]
        assert model.cache_bytes(cache) == config.cache_bytes(length, batch=3, itemsize=8)
    small = model.float()
    assert small.cache_bytes(small.prefill(tokens)[1]) == config.cache_bytes(TOKENS, batch=3)


@ALL
@torch.no_grad()
def test_cache_is_not_written_to(name):
    model = build(name)
    tokens = text(model)
    cache = model.prefill(tokens[:, :20])[1]
    first = model.prefill(tokens[:, 20:], cache)[0]
    assert max_error(model.prefill(tokens[:, 20:], cache)[0], first) == 0


@ALL
def test_generate(name):
    model, prompts = build(name), [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    options = dict(temperature=0.8, top_k=20, top_p=0.9)
    first, again, other = (
        torch.stack(list(model.generate(prompts, 6, seed=seed, **options))) for seed in (0, 0, 1)
    )
    assert first.shape == (6, 3) and torch.equal(first, again) and not torch.equal(first, other)
    greedy = torch.stack(list(model.generate(prompts, 3, temperature=0)))
    for prompt, tokens in zip(prompts, greedy.T.tolist(), strict=True):
        for i, token in enumerate(tokens):
            assert int(model(torch.tensor([prompt + tokens[:i]]))[0, -1].argmax()) == token


@ALL
def test_gradient_reaches_every_parameter(name):
    model = build(name).train()
    tokens = text(model)
    model(tokens).square().sum().backward()
    sizes = {n: 0.0 if x.grad is None else float(x.grad.abs().max()) for n, x in model.named_parameters()}
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    # where terms cancel, what is left of a gradient is rounding: float64 keeps sixteen digits
    lost = {n for n, size in sizes.items() if size <= 1e-11 * max(sizes.values())}
    assert lost == unseen(model)


def unseen(model):
    """Weights that change nothing: a bias of keys that do not turn adds the same to all scores of a query.

    And those that ask for no gradient: an indexer's, since a choice has none.
    """
    return {n for n, x in model.named_parameters() if not x.requires_grad} | {
        f"{n}.k_proj.bias"
        for n, x in model.named_modules()
        if isinstance(x, Attention) and x.rope is None and not x.borrows and x.k_proj.bias is not None
    }


@ALL
def test_autocast(name):
    """Under bfloat16 autocast every product fits the stream it is added to, and gradients are finite."""
    model = build(name).float().train()
    tokens = text(model)
    want = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    logits.float().square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    # most tokens: a few go to another expert, or keep another key, when scores are rounded to 8 bits
    error = (logits.float() - want).abs().amax(-1) / want.abs().max()
    assert error.median() < 0.1


@ALL
@torch.no_grad()
def test_state_dict_round_trip(name):
    model = build(name)
    tokens, other = text(model), LanguageModel(model.config).double().eval()
    assert max_error(other(tokens), model(tokens)) > 1e-3
    other.load_state_dict(model.state_dict())
    assert max_error(other(tokens), model(tokens)) == 0


@pytest.mark.gpu
@ALL
@torch.no_grad()
def test_on_a_gpu(name):
    """The kernels, in float32, whole and from a cache, compute what plain torch computes on the CPU."""
    model = build(name).float()
    tokens = text(model)
    want = model(tokens)
    model, tokens = model.cuda(), tokens.cuda()
    # float32 through a few layers; a wrong kernel is off by more than 1e-2
    assert relative_error(model(tokens).cpu(), want) < 1e-4
    parts, cache = [], None
    for part in (tokens[:, :17], *tokens[:, 17:].split(1, dim=1)):
        logits, cache = model.prefill(part, cache) if part.shape[1] > 1 else model.step(part[:, 0], cache)
        parts.append(logits if logits.ndim == 3 else logits[:, None])
    assert relative_error(torch.cat(parts, dim=1).cpu(), want) < 1e-4
    drawn = model.generate([[3, 1, 4], [1]], 3, temperature=0)
    assert torch.stack(list(drawn)).shape == (3, 2)


@ALL
def test_what_is_the_same_is_one(name):
    model = build(name)
    for path, one in model.config.same.items():
        assert model.get_submodule(path) is model.get_submodule(one), path


@ALL
def test_tiny_is_tiny(name):
    assert sum(x.numel() for x in build(name).parameters()) < 10**6
