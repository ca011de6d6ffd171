"""Sparse modes of a model that was trained dense, on a tiny Llama of random weights, float64 on the CPU."""

import math

import pytest
import torch

from effattn_lite import models
from effattn_lite.layers.streaming_llm import StreamingLLM
from effattn_lite.models.attention import Attention
from effattn_lite.models.config import Rope
from effattn_lite.models.sparse import DECODE, NAMES, PREFILL
from effattn_lite.testing import max_error, relative_error

TOKENS, PROMPT = 40, 35
SAMPLE = torch.arange(48).view(2, 24)
WHOLE = {
    "streaming_llm": dict(window=TOKENS),
    "minference": dict(columns=TOKENS, diagonals=0),
    "flexprefill": dict(gamma=1.0, block_size=8, min_budget=8),
    "xattention": dict(threshold=1.0, block_size=8, stride=4),
    "spargeattn": dict(threshold=1.0, block_size=8, query_block_size=8, skip=-math.inf),
    "quest": dict(budget=TOKENS, page_size=8, dense=0),
    "double_sparsity": dict(budget=TOKENS, channels=3, sample=SAMPLE),
    "resa": dict(ratio=1.0, page_size=8),
    "clusterkv": dict(budget=TOKENS, cluster_size=8, dense=0),
    "magicpig": dict(window=TOKENS, dense=0),
}
"""Options with which a mode sees everything."""
PART = {
    "streaming_llm": dict(sinks=2, window=6),
    "minference": dict(columns=6, diagonals=4, sinks=1, window=2, last_queries=8),
    "flexprefill": dict(gamma=0.5, block_size=4, min_budget=4),
    "xattention": dict(threshold=0.5, block_size=4, stride=2),
    "spargeattn": dict(threshold=0.3, similarity=-1.0, block_size=4, query_block_size=4),
    "quest": dict(budget=8, page_size=4),
    "double_sparsity": dict(budget=6, channels=2, sample=SAMPLE),
    "resa": dict(ratio=0.0, min_pages=2, page_size=4),
    "clusterkv": dict(budget=4, cluster_size=4, every=3, sinks=2),
    "magicpig": dict(tables=4, bits=4, window=4, sinks=2),
}
"""Options with which it does not."""


@pytest.fixture(scope="module")
def model():
    model = models.build("llama").double().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, tokens, *, prompt=PROMPT, cache=None):
    """Logits of a prompt in one prefill and a step a token after it; the cache."""
    logits, cache = model.prefill(tokens[:, :prompt], cache)
    logits = [logits]
    for token in tokens[:, prompt:].unbind(1):
        y, cache = model.step(token, cache)
        logits.append(y[:, None])
    return torch.cat(logits, dim=1), cache


def test_every_mode_is_tried():
    assert set(WHOLE) == set(PART) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_text_as_its_budget_is_dense(model, tokens, name):
    with torch.no_grad():
        want = model(tokens)
    assert relative_error(run(model.sparse(name, **WHOLE[name]), tokens)[0], want) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_less_is_not_dense(model, tokens, name):
    """A mode of prefill changes the prompt, one of decoding the steps alone; layers may stay dense."""
    sparse = model.sparse(name, **PART[name])
    with torch.no_grad():
        want = model(tokens)
    got = run(sparse, tokens)[0]
    assert got.isfinite().all()
    prompt, steps = max_error(got[:, :PROMPT], want[:, :PROMPT]), max_error(got[:, PROMPT:], want[:, PROMPT:])
    assert prompt < 1e-12 if name in DECODE else prompt > 1e-3
    assert steps > 1e-3
    every = model.sparse(name, **PART[name] | {"dense": (0, 1, 2)})
    assert len(every.reading.layers) == 1
    assert max_error(run(every, tokens)[0], got) > 1e-6
    assert relative_error(run(sparse.sparse(None), tokens)[0], want) < 1e-10


@pytest.mark.parametrize("name", DECODE)
def test_a_text_read_as_if_it_were_written(model, tokens, name):
    """With `prompt`, one prefill is a dense prefill of the prompt and steps behind it."""
    for prompt in (0, 17, PROMPT):
        sparse = model.sparse(name, **PART[name], prompt=prompt)
        want, _ = run(sparse, tokens, prompt=max(prompt, 1))
        with torch.no_grad():
            assert relative_error(sparse(tokens)[:, prompt:], want[:, prompt:]) < 1e-10
            first, cache = sparse.prefill(tokens[:, :20])
            rest, _ = sparse.prefill(tokens[:, 20:], cache)
        assert relative_error(torch.cat((first, rest), dim=1)[:, prompt:], want[:, prompt:]) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_unequal_length(model, name):
    """Packed prompts, then steps of all rows: each as if it were alone."""
    sparse = model.sparse(name, **PART[name])
    texts = [torch.arange(n) * 7 % 64 for n in (23, 34)]
    with torch.no_grad():
        logits, cache = sparse.prefill(
            torch.cat(texts)[None], cu_seqlens=torch.tensor([0, 23, 57]), last=True
        )
        got = [logits]
        for i in range(5):
            logits, cache = sparse.step(torch.tensor([i, i + 9]), cache)
            got.append(logits)
    for row, text in enumerate(texts):
        whole = torch.cat((text, torch.arange(5) + 9 * row))[None]
        want = run(sparse, whole, prompt=len(text))[0][0, len(text) - 1 :]
        assert relative_error(torch.stack([x[row] for x in got]), want) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_goes_on_twice(model, tokens, name):
    """A call changes no cache that another one has returned."""
    sparse = model.sparse(name, **PART[name])
    _, cache = run(sparse, tokens)
    with torch.no_grad():
        once, other = sparse.step(tokens[:, 0], cache)
        sparse.step(tokens[:, 5], sparse.step(tokens[:, 3], cache)[1])
        again, _ = sparse.step(tokens[:, 0], cache)
        assert torch.equal(once, again)
        onward, _ = sparse.step(tokens[:, 7], other)
        want, _ = sparse.step(tokens[:, 7], sparse.step(tokens[:, 0], run(sparse, tokens)[1])[1])
    assert torch.equal(onward, want)


@pytest.mark.parametrize("name", DECODE)
def test_caches_change_hands(model, tokens, name):
    """Dense goes on from a sparse mode's cache, and a sparse mode from a dense one."""
    sparse = model.sparse(name, **WHOLE[name])
    with torch.no_grad():
        want = model(tokens)[:, -1]
        _, cache = run(sparse, tokens[:, :-1])
        assert relative_error(model.step(tokens[:, -1], cache)[0], want) < 1e-10
        assert relative_error(model.prefill(tokens[:, -1:], cache)[0][:, 0], want) < 1e-10
        _, cache = model.prefill(tokens[:, :-1])
        assert relative_error(sparse.step(tokens[:, -1], cache)[0], want) < 1e-10
        assert sparse.cache_bytes(sparse.step(tokens[:, -1], cache)[1]) > model.cache_bytes(cache)


def test_streaming_is_the_layer(model):
    """Positions inside the cache, sinks and window: what the layer does, chunked and step by step."""
    x = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = StreamingLLM(32, 4, kv_heads=2, sinks=2, window=6).double()
    ours = Attention(32, 4, kv_heads=2, rope=Rope()).double()
    ours.load_state_dict(want.state_dict())
    shared = {"reading": model.sparse("streaming_llm", sinks=2, window=6).reading.at(0, "prefill")}
    for lengths in ((30,), (9, 1, 13, 7), (1,) * 30):
        outputs, cache = [], None
        for part in x.split(lengths, dim=1):
            y, cache = ours.prefill(part, cache, shared=shared)
            outputs.append(y)
        assert relative_error(torch.cat(outputs, dim=1), want(x)) < 1e-10
        assert cache["k"].shape[1] == 2 + 5
    in_text = model.sparse("streaming_llm", sinks=2, window=6, positions="text").reading.at(0, "prefill")
    assert relative_error(ours.prefill(x, shared={"reading": in_text})[0], want(x)) > 1e-3


def test_resa_mends_its_cache(model, tokens):
    """After each dense pass the tokens are drawn as a dense model draws them from the same text."""
    options = dict(ratio=0.0, min_pages=1, page_size=4)
    want = torch.stack(list(model.generate(tokens, 13, temperature=0)))
    every = model.sparse("resa", **options, rectify=1)
    assert torch.equal(torch.stack(list(every.generate(tokens, 13, temperature=0))), want)
    drawn = {}
    for rectify in (4, None):
        sparse = model.sparse("resa", **options, rectify=rectify)
        drawn[rectify] = torch.stack(list(sparse.generate(tokens, 13, temperature=0)))
        text = torch.cat((tokens, drawn[rectify].T), dim=1)
        with torch.no_grad():
            dense = model(text)[:, TOKENS - 1 : -1].argmax(-1).T
        if rectify:
            assert torch.equal(drawn[4][::4], dense[::4])
    assert not torch.equal(drawn[None], want) and not torch.equal(drawn[None], drawn[4])


@pytest.mark.parametrize("name", NAMES)
def test_generate(model, name):
    sparse = model.sparse(name, **PART[name])
    for prompts in ([[1, 2, 3] * 8, [4, 5, 6] * 8], [[7] * 19, [1, 2, 3] * 8]):
        rows = [torch.stack(list(sparse.generate(prompts, 5, seed=3))) for _ in range(2)]
        assert rows[0].shape == (5, 2) and torch.equal(*rows)


def test_a_hybrid_keeps_its_other_layers(tokens):
    """Jamba's one layer of attention in four reads sparsely; states and convolutions go on."""
    jamba = models.build("jamba").double().eval()
    with torch.no_grad():
        want = jamba(tokens % jamba.config.vocab)
    got, _ = run(jamba.sparse("quest", **WHOLE["quest"]), tokens % jamba.config.vocab)
    assert relative_error(got, want) < 1e-10


def test_the_model_itself_stays_dense(model, tokens):
    with torch.no_grad():
        want = model(tokens)
        sparse = model.sparse("streaming_llm", window=4)
        assert max_error(sparse(tokens), want) > 1e-3 and torch.equal(model(tokens), want)
    assert sparse.embedding.weight is model.embedding.weight and model.reading is None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("question", {}, "no sparse mode is called 'question', expected one of streaming_llm, minference"),
        ("quest", dict(budget=8, pages=4), "quest takes no option pages; it takes budget, page_size"),
        ("quest", {}, "quest needs the option budget"),
        ("quest", dict(budget=0), "budget is 0"),
        ("quest", dict(budget=8, dense=4), r"no layer is left for quest: .* \[0, 1, 2, 3\], dense are"),
        ("xattention", dict(block_size=9), "block_size is 9, expected a multiple of stride"),
        ("xattention", dict(prompt=4), "xattention takes no option prompt"),
        ("double_sparsity", dict(budget=8, channels=4), "needs the option sample"),
        ("double_sparsity", dict(budget=8, channels=[9]), r"channels is \[\[9\], \[9\]\], expected 0 to"),
        ("magicpig", dict(tables=1, dense=0), "L >= 2"),
        ("resa", dict(rectify=0), "rectify is 0"),
        ("streaming_llm", dict(window=4, positions="none"), "positions is 'none'"),
    ],
)
def test_a_wrong_mode_says_what_is_wrong(model, name, options, words):
    with pytest.raises(ValueError, match=words):
        model.sparse(name, **options)


@pytest.mark.parametrize("name", PREFILL)
def test_a_method_of_prefill_takes_no_half_prompt(model, tokens, name):
    sparse = model.sparse(name, **PART[name])
    with pytest.raises(ValueError, match=f"{name} chooses from a whole prompt"):
        list(sparse.generate(tokens, 2, chunk=16))


def test_attention_that_no_mode_reads():
    with pytest.raises(ValueError, match="layer 0 has sinks|layer 1 has sinks"):
        models.build("gpt_oss").sparse("quest", budget=8)
    with pytest.raises(ValueError, match=r"no layer is left for quest: full attention is in layers \[\]"):
        models.build("falcon_mamba").sparse("quest", budget=8)
