"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention, no positions, many experts.

The delta layers tell where a token stands, so that the slot of latent attention that would turn stays as it
is. Experts are chosen by sigmoids and a balancing bias that is no weight of the sum; the first layer is
dense.

Source: Kimi Team 2025, arXiv:2510.26692; sizes from the published configuration, which counts the layers of
full attention from 1: 4, 8, ..., 24 and 27.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule, activation, ends, experts, latent, letters

TYPES = ("kimi_linear",)
LETTERS = {"linear_attention": "K", "full_attention": "A"}
BLOCK, MIXER = "model.layers.{i}", "blocks.{i}.mixer"


def config(
    *, vocab, width, pattern="KKKA", depth=None, heads, rank, nope_dim, rope_dim, value_dim, q_rank=None,
    delta_heads, delta_dim, conv_size=4, routed, top, hidden, shared=1, dense, feeds, scale=2.446, groups=1,
    top_groups=1, normalise=True, bias=False, gate_bias=False, act="silu", eps=1e-5, tie=False,
):  # fmt: skip
    """Kimi Linear of some size: delta "K" and latent "A"; dense "F" and experts "E"."""
    return Config(
        name="kimi_linear",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        feeds=feeds,
        mixers={
            "K": Part("kda", heads=delta_heads, head_dim=delta_dim, conv_size=conv_size, norm_eps=eps,
                      gate_bias=gate_bias),
            "A": Part("latent_attention", heads=heads, rank=rank, nope_dim=nope_dim, rope_dim=rope_dim,
                      value_dim=value_dim, q_rank=q_rank, bias=bias),
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


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, rank=16, nope_dim=8, rope_dim=4, value_dim=8, delta_heads=2,
        delta_dim=16, routed=6, top=2, hidden=16, dense=48, feeds="FEEE",
    ),
    "48b": config(
        vocab=163_840, width=2304, pattern="KKKA" * 6 + "KKA", heads=32, rank=512, nope_dim=128, rope_dim=64,
        value_dim=128, delta_heads=32, delta_dim=128, routed=256, top=8, hidden=1024, dense=9216,
        feeds="F" + "E" * 26,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `KimiLinearConfig`; its default `layer_types` are one layer off the published model.

    Raises:
        ValueError: an activation of the convolutions that ours does not have.
    """
    if theirs.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {theirs.hidden_act!r}, expected 'silu'")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        rank=theirs.kv_lora_rank,
        nope_dim=theirs.qk_nope_head_dim,
        rope_dim=theirs.qk_rope_head_dim,
        value_dim=theirs.v_head_dim,
        q_rank=theirs.q_lora_rank,
        delta_heads=theirs.linear_num_heads,
        delta_dim=theirs.linear_head_dim,
        conv_size=theirs.linear_conv_kernel_dim,
        routed=theirs.num_local_experts,
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
    """Where the weights of a `KimiLinearForCausalLM` go, and of its files, which have other names."""
    theirs, heads = f"{BLOCK}.self_attn", config.mixers["K"].options["heads"]
    decays = [
        ("f_a_proj.weight", "decay_proj.0.weight", None),
        ("f_b_proj.weight", "decay_proj.1.weight", None),
        ("A_log", "A_log", lambda x: x.view(heads, 1)),
        ("dt_bias", "step_bias", lambda x: x.view(heads, -1)),
    ]
    return [
        *ends(),
        *_q_projections(config, theirs),
        *(Rule(f"{theirs}.{name}_proj.weight", f"{MIXER}.proj.{name}.weight") for name in "kv"),
        Rule(f"{theirs}.conv1d.weight", tuple(f"{MIXER}.conv.{name}.weight" for name in "qkv"),
             lambda x: x.squeeze(1).chunk(3)),
        *(Rule(f"{theirs}.{name}_conv1d.weight", f"{MIXER}.conv.{name}.weight", lambda x: x.squeeze(1))
          for name in "qkv"),
        Rule(f"{theirs}.b_proj.weight", f"{MIXER}.beta_proj.weight"),
        *(Rule(f"{theirs}{gate}.{name}", f"{MIXER}.{own}", change)
          for name, own, change in decays for gate in (".forget_gate", "")),
        Rule(f"{theirs}.g_a_proj.weight", f"{MIXER}.gate_proj.0.weight"),
        Rule(f"{theirs}.g_b_proj.weight", f"{MIXER}.gate_proj.1.weight"),
        Rule(f"{theirs}.o_norm.weight", f"{MIXER}.norm.weight", lambda x: x[None]),
        *latent(),
        *experts(),
        *experts(f"{BLOCK}.block_sparse_moe", files=("w1", "w3", "w2")),
        Rule(f"{BLOCK}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule(f"{BLOCK}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]  # fmt: skip


def _q_projections(config, theirs):
    """Both kinds of layer have a `q_proj`, but ours have two names."""
    own = {"K": "proj.q", "A": "q_proj"}
    return [
        Rule(f"{theirs}.q_proj.weight".replace("{i}", str(i)), f"blocks.{i}.mixer.{own[layer.letter]}.weight")
        for i, layer in enumerate(config.layers)
    ]
