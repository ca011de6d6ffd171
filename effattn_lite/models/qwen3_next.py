"""Qwen3-Next: three gated delta layers to one of gated attention, and many small experts in every layer.

Attention turns a quarter of each head's channels, norms queries and keys, and multiplies its output by a
sigmoid gate. Norms store their weight minus one, save the one inside the delta layers. An expert that every
token goes to has a gate of its own.

Source: Qwen Team 2025, "Qwen3-Next"; sizes and equations of the released code in transformers, the base of
the rotary positions as public listings of the checkpoint's configuration have it.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, rope
from effattn_lite.models.theirs import experts as mixture

TYPES = ("qwen3_next",)
LETTERS = {"linear_attention": "G", "full_attention": "A"}
BLOCK, MIXER = "model.layers.{i}", "blocks.{i}.mixer"


def config(
    *, vocab, width, pattern="GGGA", depth=None, heads, kv_heads, head_dim, turns, delta_heads, delta_dim,
    value_heads, expand_v=1, conv_size=4, experts, top, hidden, shared, feeds="E", dense=None, bias=False,
    normalise=True, act="silu", eps=1e-6, tie=False,
):  # fmt: skip
    """Qwen3-Next of some size: gated delta "G" and attention "A"; experts "E" and dense "F"."""
    norm = Norm("rms", eps=eps, offset=1.0)
    return Config(
        name="qwen3_next",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        feeds=feeds,
        mixers={
            "G": Part("gated_delta", heads=delta_heads, head_dim=delta_dim, value_heads=value_heads,
                      expand_v=expand_v, conv_size=conv_size, norm_eps=eps),
            "A": Part("attention", heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=turns,
                      qk_norm=norm, gate=True, bias=bias),
        },
        feed_forwards={
            "E": Part("experts", hidden=hidden, experts=experts, top=top, normalise=normalise,
                      shared=shared, shared_gate=True, activation=act),
            "F": Part("gated", hidden=dense or hidden, activation=act),
        },
        norm=norm,
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, kv_heads=2, head_dim=8, turns=Rope(1e7, dims=4), delta_heads=2,
        delta_dim=8, value_heads=4, experts=8, top=2, hidden=16, shared=16,
    ),
    "80b": config(
        vocab=151_936, width=2048, depth=48, heads=16, kv_heads=2, head_dim=256, turns=Rope(1e7, dims=64),
        delta_heads=16, delta_dim=128, value_heads=32, experts=512, top=10, hidden=512, shared=512,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `Qwen3NextConfig`.

    Raises:
        ValueError: value heads that are not a whole multiple of key heads wide; another activation.
    """
    if theirs.linear_value_head_dim % theirs.linear_key_head_dim or theirs.hidden_act not in (
        "silu",
        "swish",
    ):
        raise ValueError(
            f"linear_value_head_dim is {theirs.linear_value_head_dim} and hidden_act is "
            f"{theirs.hidden_act!r}, expected a multiple of {theirs.linear_key_head_dim} and 'silu'"
        )
    sparse = [
        theirs.num_experts > 0
        and i not in theirs.mlp_only_layers
        and (i + 1) % theirs.decoder_sparse_step == 0
        for i in range(theirs.num_hidden_layers)
    ]
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        turns=rope(theirs.rope_parameters, head_dim=theirs.head_dim),
        delta_heads=theirs.linear_num_key_heads,
        delta_dim=theirs.linear_key_head_dim,
        value_heads=theirs.linear_num_value_heads,
        expand_v=theirs.linear_value_head_dim // theirs.linear_key_head_dim,
        conv_size=theirs.linear_conv_kernel_dim,
        experts=theirs.num_experts,
        top=theirs.num_experts_per_tok,
        hidden=theirs.moe_intermediate_size,
        shared=theirs.shared_expert_intermediate_size,
        feeds="".join("E" if some else "F" for some in sparse),
        dense=theirs.intermediate_size,
        bias=theirs.attention_bias,
        normalise=theirs.norm_topk_prob,
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Qwen3NextForCausalLM` go."""
    return [
        *ends(),
        *_delta(config.mixers["G"].options),
        *_attention(config.mixers["A"].options["heads"]),
        *mixture(),
        Rule(f"{BLOCK}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule(f"{BLOCK}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]


def _attention(heads):
    def apart(x):
        # rows of each head: its query, then its gate
        return tuple(part.flatten(0, 1) for part in x.unflatten(0, (heads, 2, -1)).unbind(1))

    return [
        Rule(
            f"{BLOCK}.self_attn.q_proj.{name}", (f"{MIXER}.q_proj.{name}", f"{MIXER}.gate_proj.{name}"), apart
        )
        for name in ("weight", "bias")
    ] + [Rule(f"{BLOCK}.self_attn.*", f"{MIXER}.*")]


def _delta(options):
    H, K, HV = options["heads"], options["head_dim"], options["value_heads"]
    V = K * options["expand_v"]

    def apart(*sizes):
        # rows of each key head: all that belongs to it
        return lambda x: tuple(part.flatten(0, 1) for part in x.unflatten(0, (H, -1)).split(sizes, dim=1))

    own = [f"{MIXER}.proj.{name}.weight" for name in "qkv"]
    share = HV // H
    theirs = f"{BLOCK}.linear_attn"
    return [
        Rule(f"{theirs}.in_proj_qkvz.weight", (*own, f"{MIXER}.gate_proj.weight"),
             apart(K, K, share * V, share * V)),
        Rule(f"{theirs}.in_proj_ba.weight", (f"{MIXER}.beta_proj.weight", f"{MIXER}.decay_proj.weight"),
             apart(share, share)),
        Rule(f"{theirs}.conv1d.weight", tuple(f"{MIXER}.conv.{name}.weight" for name in "qkv"),
             lambda x: x.squeeze(1).split((H * K, H * K, HV * V))),
        Rule(f"{theirs}.dt_bias", f"{MIXER}.step_bias"),
        Rule(f"{theirs}.A_log", f"{MIXER}.A_log"),
        Rule(f"{theirs}.norm.weight", f"{MIXER}.norm.weight", lambda x: x[None]),
        Rule(f"{theirs}.out_proj.weight", f"{MIXER}.o_proj.weight"),
    ]  # fmt: skip
