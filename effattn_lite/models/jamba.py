"""Jamba: seven Mamba layers to one of attention, and a mixture of experts in every second layer.

Attention is the fifth of eight layers and has no positions: the recurrence has told where a token stands.
Mamba's step, B and C are normed. Of 16 experts a token goes to two, whose weights are not made to sum to 1.

Source: Lieber et al. 2024, arXiv:2403.19887; sizes from the published configurations.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule, activation, ends

TYPES = ("jamba",)


def config(
    *, vocab, width, pattern="MMMMAMMM", feeds="FE", depth=None, heads, kv_heads, hidden, experts, top,
    states=16, conv_size=4, expand=2, rank=None, act="silu", eps=1e-6, tie=False,
):  # fmt: skip
    """Jamba of some size: Mamba "M" and attention "A"; dense "F" and experts "E"."""
    return Config(
        name="jamba",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        feeds=feeds,
        mixers={
            "M": Part("mamba", states=states, conv_size=conv_size, expand=expand, rank=rank, norm_eps=eps),
            "A": Part("attention", heads=heads, kv_heads=kv_heads),
        },
        feed_forwards={
            "F": Part("gated", hidden=hidden, activation=act),
            "E": Part("experts", hidden=hidden, experts=experts, top=top, activation=act),
        },
        norm=Norm("rms", eps=eps),
        tie=tie,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, heads=4, kv_heads=2, hidden=48, experts=4, top=2, states=8),
    "52b": config(vocab=65_536, width=4096, depth=32, heads=32, kv_heads=8, hidden=14_336, experts=16, top=2),
}


def from_config(theirs) -> Config:
    """Ours of a `JambaConfig`.

    Raises:
        ValueError: biases that ours does not have.
    """
    if theirs.mamba_proj_bias or not theirs.mamba_conv_bias:
        raise ValueError(
            "expected mamba_proj_bias False and mamba_conv_bias True, as in the published models"
        )
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern="".join("A" if kind == "attention" else "M" for kind in theirs.layers_block_type),
        feeds="".join("E" if n > 1 else "F" for n in theirs.layers_num_experts),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        hidden=theirs.intermediate_size,
        experts=theirs.num_experts,
        top=theirs.num_experts_per_tok,
        states=theirs.mamba_d_state,
        conv_size=theirs.mamba_d_conv,
        expand=theirs.mamba_expand,
        rank=theirs.mamba_dt_rank,
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `JambaForCausalLM` go."""
    mamba, experts = "model.layers.{i}.mamba", "model.layers.{i}.feed_forward.experts"
    return [
        *ends(),
        Rule("model.final_layernorm.weight", "norm.weight"),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule(f"{mamba}.conv1d.weight", "blocks.{i}.mixer.conv.weight", lambda x: x.squeeze(1)),
        Rule(f"{mamba}.conv1d.bias", "blocks.{i}.mixer.conv.bias"),
        Rule(f"{mamba}.dt_layernorm.weight", "blocks.{i}.mixer.norms.0.weight"),
        Rule(f"{mamba}.b_layernorm.weight", "blocks.{i}.mixer.norms.1.weight"),
        Rule(f"{mamba}.c_layernorm.weight", "blocks.{i}.mixer.norms.2.weight"),
        Rule(f"{mamba}.*", "blocks.{i}.mixer.*"),
        Rule("model.layers.{i}.feed_forward.router.*", "blocks.{i}.feed_forward.router.*"),
        Rule(
            f"{experts}.gate_up_proj",
            ("blocks.{i}.feed_forward.gate", "blocks.{i}.feed_forward.up"),
            lambda x: x.chunk(2, dim=1),
        ),
        Rule(f"{experts}.down_proj", "blocks.{i}.feed_forward.down"),
        # in files every expert has tensors of its own
        *(
            Rule(f"{experts}.{{e}}.{name}_proj.weight", f"blocks.{{i}}.feed_forward.{name}")
            for name in ("gate", "up", "down")
        ),
        Rule("model.layers.{i}.feed_forward.*", "blocks.{i}.feed_forward.*"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.pre_ff_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]
