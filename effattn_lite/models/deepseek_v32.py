"""DeepSeek-V3.2: latent attention in every layer, on the few tokens that a small indexer chooses.

Attention sees at most 2048 tokens of any text, those that the indexer scores highest; it alone reads all of
them. Of the experts, whose first layers are dense networks, a token goes to those of its best groups.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2-Exp"; sizes and equations of the released code in transformers. The
stretching of positions in the preset is DeepSeek-V3's and unverified for this model.
"""

import math
from dataclasses import replace

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, experts, latent, letters, rope

TYPES = ("deepseek_v32",)


def config(
    *, vocab, width, depth, heads, q_rank, rank, nope_dim, rope_dim, value_dim, turns, index_heads, index_dim,
    index_top, routed, top, hidden, shared=1, dense, feeds, scale=2.5, groups=8, top_groups=4, sharpen=1.0,
    normalise=True, bias=False, act="silu", eps=1e-6, tie=False,
):  # fmt: skip
    """DeepSeek-V3.2 of some size: dense "F" and experts "E"; products are `sharpen` times as large."""
    return Config(
        name="deepseek_v32",
        vocab=vocab,
        width=width,
        pattern="A",
        depth=depth,
        feeds=feeds,
        mixers={
            "A": Part("latent_attention", heads=heads, q_rank=q_rank, rank=rank, nope_dim=nope_dim,
                      rope_dim=rope_dim, value_dim=value_dim, rope=turns, bias=bias,
                      scale=sharpen * (nope_dim + rope_dim) ** -0.5,
                      index_heads=index_heads, index_dim=index_dim, index_top=index_top),
        },
        feed_forwards={
            "F": Part("gated", hidden=dense, activation=act),
            "E": Part("experts", hidden=hidden, experts=routed, top=top, scores="sigmoid", balance=True,
                      normalise=normalise, scale=scale, groups=groups, top_groups=top_groups,
                      shared=shared * hidden, activation=act),
        },
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


def _sharpen(factor, amount=1.0):
    """Factor on products where positions are stretched `factor` times: a query's gain times a key's."""
    return (0.1 * amount * math.log(factor) + 1) ** 2


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, q_rank=16, rank=16, nope_dim=8, rope_dim=4, value_dim=8,
        turns=Rope(1e4, adjacent=True), index_heads=16, index_dim=8, index_top=8, routed=8, top=2, hidden=16,
        dense=48, feeds="FEEE", groups=4, top_groups=2,
    ),
    "671b": config(
        vocab=129_280, width=7168, depth=61, heads=128, q_rank=1536, rank=512, nope_dim=128, rope_dim=64,
        value_dim=128, index_heads=64, index_dim=128, index_top=2048, routed=256, top=8, hidden=2048,
        dense=18_432, feeds="FFF" + "E" * 58, sharpen=_sharpen(40.0),
        turns=Rope(1e4, adjacent=True, scaling="yarn", factor=40.0, context=4096, gain=1.0),
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `DeepseekV32Config`."""
    turns, sharpen = _positions(theirs.rope_parameters)
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        q_rank=theirs.q_lora_rank,
        rank=theirs.kv_lora_rank,
        nope_dim=theirs.qk_nope_head_dim,
        rope_dim=theirs.qk_rope_head_dim,
        value_dim=theirs.v_head_dim,
        turns=turns,
        sharpen=sharpen,
        index_heads=theirs.index_n_heads,
        index_dim=theirs.index_head_dim,
        index_top=theirs.index_topk,
        routed=theirs.n_routed_experts,
        top=theirs.num_experts_per_tok,
        hidden=theirs.moe_intermediate_size,
        shared=theirs.n_shared_experts,
        dense=theirs.intermediate_size,
        feeds=letters(theirs.mlp_layer_types, {"dense": "F", "sparse": "E"}),
        scale=theirs.routed_scaling_factor,
        groups=theirs.n_group,
        top_groups=theirs.topk_group,
        normalise=theirs.norm_topk_prob,
        bias=theirs.attention_bias,
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `DeepseekV32ForCausalLM` go."""
    theirs, ours = "model.layers.{i}.self_attn", "blocks.{i}.mixer"
    names = {"wq_b": "q_proj", "wk": "k_proj", "k_norm": "k_norm", "weights_proj": "weight_proj"}
    return [
        *ends(),
        *latent(),
        *(Rule(f"{theirs}.indexer.{name}.*", f"{ours}.indexer.{own}.*") for name, own in names.items()),
        *experts(),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]


def _positions(parameters):
    """Rotary positions, and the factor on products that goes with their stretching."""
    turns, amount = rope(parameters, adjacent=True), parameters.get("mscale_all_dim")
    if turns.scaling != "yarn" or not amount:
        return turns, 1.0
    sharpen = _sharpen(turns.factor, amount)
    if parameters.get("mscale") and turns.gain is None:
        turns = replace(turns, gain=(_sharpen(turns.factor, parameters["mscale"]) / sharpen) ** 0.5)
    return turns, sharpen
