"""Parts of architectures that transformers lacks, against what it has; and what is special to one of them."""

import dataclasses
import math

import pytest
import torch

from effattn_lite import models
from effattn_lite.models.config import Rope
from effattn_lite.models.convert import load
from effattn_lite.models.differential_attention import DifferentialAttention
from effattn_lite.models.latent_attention import Indexer
from effattn_lite.models.lm import LanguageModel
from effattn_lite.models.rotary import turn
from effattn_lite.testing import max_error, relative_error

RTOL = 1e-10


def tiny(name, preset="tiny", **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(models.recipe(name).PRESETS[preset], **changes)
    model = LanguageModel(config).double().eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def text(rows=2, length=40):
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_differential_attention_is_diffllamas():
    """Theirs pairs head j with head j + H / 2, ours 2 j with 2 j + 1."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import SIZES, randomise

    turns = {"rope_type": "default", "rope_theta": 100.0}
    heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    config = transformers.DiffLlamaConfig(
        **SIZES | heads, num_hidden_layers=3, intermediate_size=48, attention_bias=True, rope_parameters=turns
    )
    config._attn_implementation = "eager"
    theirs = transformers.DiffLlamaForCausalLM(config).eval()
    randomise(theirs)
    seen, layer = {}, theirs.model.layers[2].self_attn
    layer.register_forward_hook(
        lambda module, args, named, out: seen.update(x=named["hidden_states"], y=out[0]), with_kwargs=True
    )
    theirs(text())
    ours = DifferentialAttention(
        32, 8, place=(2, 3), kv_heads=4, head_dim=8, bias=True, rope=Rope(100.0),
        norm_eps=config.rms_norm_eps, norm_weight=False,
    )  # fmt: skip
    for name, heads in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        for kind in ("weight", "bias"):
            x = getattr(getattr(layer, name), kind)
            paired = x.unflatten(0, (2, heads // 2, 8)).transpose(0, 1).flatten(0, 2)
            getattr(getattr(ours, name), kind).copy_(paired)
    ours.o_proj.load_state_dict(layer.o_proj.state_dict())
    mix = (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2)
    ours.mix.copy_(torch.stack(mix).view(2, 2, -1))
    assert relative_error(ours(seen["x"]), seen["y"]) < 1e-5


@torch.no_grad()
def test_minicpm4_that_reads_all_blocks_is_granite():
    """Granite has the same three factors, and dense attention."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from peers import SIZES, randomise

    config = transformers.GraniteConfig(
        **SIZES, num_hidden_layers=4, intermediate_size=48, embedding_multiplier=12.0, logits_scaling=4.0,
        residual_multiplier=1.4 / math.sqrt(4), attention_multiplier=8**-0.5, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = transformers.GraniteForCausalLM(config).eval()
    randomise(theirs)
    blocks = dict(block_size=4, init_blocks=1, local_blocks=2, kernel_size=2, kernel_stride=1)
    sizes = dict(vocab=64, width=32, depth=4, heads=4, kv_heads=2, hidden=48, base=8)
    recipe, rules = models.recipe("minicpm4"), models.recipe("llama")
    all_of_them, few = (
        load(LanguageModel(config), rules.weights(config), theirs.state_dict()).eval()
        for config in (recipe.config(**sizes, blocks=blocks | {"top_k": top}) for top in (8, 2))
    )
    want = theirs(text()).logits
    assert relative_error(all_of_them(text()), want) < 1e-4
    # four blocks of four: the first 16 tokens see all, later ones do not
    assert relative_error(few(text())[:, :16], want[:, :16]) < 1e-4
    assert max_error(few(text())[:, 24:], want[:, 24:]) > 1e-2


@torch.no_grad()
def test_indexer_takes_the_earliest_of_equals():
    """One head whose weight is 0 scores all tokens 0; no later token is ever chosen."""
    indexer = Indexer(8, 8, heads=1, dim=4, top=3, rope_dim=2)
    q, k = torch.randn(1, 6, 1, 4), torch.randn(1, 6, 4)
    chosen = indexer.choose(q, torch.zeros(1, 6, 1), k)
    none = -1
    want = [[0, none, none], [0, 1, none], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert chosen[0].tolist() == want
    rising = torch.arange(6.0).view(1, 6, 1).expand(-1, -1, 4)
    best = indexer.choose(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1), rising)
    assert best[0, 0].tolist() == [5, 4, 3]


@pytest.mark.parametrize(("name", "late"), [("yoco", 4), ("phi4_mini_flash", 6)])
@torch.no_grad()
def test_prefill_runs_the_reading_half_for_the_last_token(name, late):
    model, shapes, tokens = tiny(name), [], text()
    assert model.config.late == late < len(model.blocks)
    for block in model.blocks:
        block.mixer_norm.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    logits, cache = model.prefill(tokens, last=True)
    assert shapes == [(2, 40, 32)] * late + [(2, 32)] * (len(model.blocks) - late)
    assert relative_error(logits, model(tokens)[:, -1]) < RTOL
    whole = model.prefill(tokens)[1]
    step = torch.tensor([3, 5])
    assert relative_error(model.step(step, cache)[0], model.step(step, whole)[0]) < RTOL
    edges = torch.tensor([0, 9, 30, 40])
    logits, _ = model.prefill(tokens[:1], cu_seqlens=edges, last=True)
    assert relative_error(logits, model(tokens[:1], cu_seqlens=edges)[0, edges[1:] - 1]) < RTOL


@torch.no_grad()
def test_meta_tokens_are_a_prompt_of_learned_vectors():
    """The same model without them reads a text whose first tokens have their vectors as embeddings."""
    model = tiny("hymba")
    plain = LanguageModel(dataclasses.replace(model.config, meta=0)).double().eval()
    state = model.state_dict()
    meta = state.pop("meta.weight")
    plain.load_state_dict(state)
    # tied weights: the head of these tokens is not looked at
    plain.embedding.weight[61:64] = meta
    tokens, prompt = text(), torch.tensor([[61, 62, 63]]).expand(2, -1)
    want = plain(torch.cat((prompt, tokens), dim=1))[:, 3:, :61]
    assert relative_error(model(tokens)[..., :61], want) < RTOL
    streams = zip(
        model.hidden_states(tokens), plain.hidden_states(torch.cat((prompt, tokens), dim=1)), strict=True
    )
    assert all(relative_error(x, y[:, 3:]) < RTOL for x, y in streams)
    model.meta.weight.zero_()
    assert max_error(model(tokens)[..., :61], want) > 1e-3


@torch.no_grad()
def test_windowed_heads_of_hymba_see_the_first_tokens():
    """Against a softmax with a mask; values are wider than keys; the other half is Mamba's layer itself."""
    layer, x = tiny("hymba").blocks[1].mixer, torch.randn(2, 20, 32, dtype=torch.float64)
    attention, mamba, t = layer.attention, layer.mamba, torch.arange(20)
    rope = attention.rope
    q, k, v = (
        proj(x).unflatten(-1, (heads, -1))
        for proj, heads in ((attention.q_proj, 4), (attention.k_proj, 2), (attention.v_proj, 2))
    )
    assert q.shape[-1] == 8 and v.shape[-1] == 16
    q, k = turn(q, t[None], rope), turn(k, t[None], rope)
    k, v = (z.repeat_interleave(2, dim=2) for z in (k, v))
    back = t[:, None] - t
    seen = (back >= 0) & ((back < 6) | (t < 3))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 8**-0.5
    o = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(2)
    y, z, _ = mamba.scan(x)

    def normed(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    other = normed(y * z * z.sigmoid(), layer.mamba_norm.weight)
    want = (normed(o, layer.attention_norm.weight) + other) / 2 @ layer.o_proj.weight.T
    got, cache = layer.prefill(x, shared={"position": t[None].expand(2, -1)})
    assert relative_error(got, want) < RTOL
    assert cache["attention"]["k"].shape == (2, 3 + 6 - 1, 2, 8)


@torch.no_grad()
def test_gated_retention_token_by_token():
    """The recurrence of the paper, with pairs of adjacent channels as complex numbers."""
    layer, x = tiny("yoco").blocks[0].mixer, torch.randn(1, 20, 32, dtype=torch.float64)
    q, k, v = (
        (x[0] @ proj.weight.T).unflatten(-1, (4, 8)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    # 4 pairs a head, wavelengths from 2 pi to 10000 * 2 pi, both included
    angle = torch.arange(20.0, dtype=torch.float64)[:, None, None] / 10_000 ** torch.linspace(
        0, 1, 4, dtype=torch.float64
    )
    phase = torch.polar(torch.ones_like(angle), angle)
    q, k = (
        torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (4, 2)).contiguous()) * phase).flatten(-2)
        for z in (q, k)
    )
    keep = (x[0] @ layer.decay_proj.weight.T).sigmoid() ** (1 / 16)
    state, out = torch.zeros(4, 8, 8, dtype=torch.float64), []
    for t in range(20):
        state = keep[t, :, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
        o = torch.einsum("hk,hkv->hv", q[t], state) / 8**0.5
        out.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    gate = x[0] @ layer.g_proj.weight.T
    want = (gate * gate.sigmoid() * torch.stack(out).flatten(1)) @ layer.o_proj.weight.T
    assert relative_error(layer(x)[0], want) < RTOL


@torch.no_grad()
def test_a_gated_memory_unit_reads_the_scan_before_its_gate():
    model = tiny("phi4_mini_flash")
    lender, reader = model.blocks[4].mixer, model.blocks[6].mixer
    x, shared = torch.randn(2, 15, 32, dtype=torch.float64), {}
    y, _ = lender.prefill(x, shared=shared)
    u, z = lender.in_proj(x).chunk(2, dim=-1)
    padded = torch.nn.functional.pad(u, (0, 0, 3, 0))
    u = sum(padded[:, i : i + 15] * lender.conv.weight[:, i] for i in range(4)) + lender.conv.bias
    u = u * u.sigmoid()
    r, B, C = lender.x_proj(u).split((2, 8, 8), dim=-1)
    dt = torch.nn.functional.softplus(lender.dt_proj(r))
    state, memory = torch.zeros(2, 64, 8, dtype=torch.float64), []
    for t in range(15):
        decay = (-dt[:, t, :, None] * lender.A_log.exp()).exp()
        state = decay * state + (dt * u)[:, t, :, None] * B[:, t, None]
        memory.append((state * C[:, t, None]).sum(-1) + lender.D * u[:, t])
    memory = torch.stack(memory, dim=1)
    assert relative_error(shared["memory"], memory) < 1e-9
    assert relative_error(y, (memory * z * z.sigmoid()) @ lender.out_proj.weight.T) < 1e-9
    other = torch.randn_like(x)
    inner = other @ reader.in_proj.weight.T
    want = (inner * inner.sigmoid() * memory) @ reader.out_proj.weight.T
    assert relative_error(reader.prefill(other, shared=shared)[0], want) < 1e-9


def test_character_ai_keeps_a_twentieth():
    """Against grouped attention with 8 heads of keys and values in all layers, at 8 k tokens and more."""
    config = models.recipe("character_ai").PRESETS["7b"]
    for tokens in (8192, 65_536):
        grouped = 36 * tokens * 2 * 8 * 128 * 2
        assert config.cache_bytes(tokens, itemsize=2) * 20 < grouped


@torch.no_grad()
def test_first_values_of_rwkv7_are_mixed_in_by_a_sigmoid():
    """A share of 0 is a model without it; a share of 1 gives every layer the first one's values."""
    model = tiny("rwkv_series", "tiny7")
    part = model.config.mixers["R"]
    options = {name: x for name, x in part.options.items() if name != "value_rank"}
    config = dataclasses.replace(model.config, mixers={"R": type(part)(part.kind, **options)})
    plain = LanguageModel(config).double().eval()
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all(".first_values." in name for name in left.unexpected_keys)
    later, tokens = model.blocks[1:], text()
    assert max_error(model(tokens), plain(tokens)) > 1e-4
    for block in later:
        block.mixer.first_values.bias.fill_(-1e9)
    assert relative_error(model(tokens), plain(tokens)) < RTOL
    for block in later:
        block.mixer.first_values.bias.fill_(1e9)
    seen = []
    for block in model.blocks:
        project = block.mixer._project
        block.mixer._project = lambda *args, project=project: seen.append(project(*args)) or seen[-1]
    model(tokens)
    values = [tensors["v"] for tensors, _ in seen]
    assert all(max_error(v, values[0]) < 1e-12 for v in values)
