"""Falcon-H1: attention and Mamba-2 side by side in every layer, on one input, their outputs added.

No layer has to choose, and the share of each is a matter of widths. Most projections are scaled
by fixed factors, muP's, which are the table `factors`. Attention turns by base 1e11.

Source: Zuo et al. 2025, arXiv:2507.22448; sizes and factors from the published configuration of 0.5B.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, mamba2, rope

TYPES = ("falcon_h1",)

ONES = dict(
    embedding=1.0, head=1.0, attention_in=1.0, key=1.0, attention_out=1.0, ssm_in=1.0, ssm=(1.0,) * 5,
    ssm_out=1.0, gate=1.0, down=1.0,
)  # fmt: skip
"""The factors, all 1; the five of `ssm` are those of z, x, B, C and dt."""


def config(
    *, vocab, width, depth, heads, kv_heads, head_dim, hidden, mamba_heads, mamba_dim, state, groups=1,
    taps=4, norm=None, steps=(0.0, float("inf")), conv_bias=True, bias=False, act="silu", rope=None,
    factors=None, eps=1e-5, tie=False,
):  # fmt: skip
    """Falcon-H1 of some size; `norm` is Mamba-2's, `factors` what differs from 1."""
    c = ONES | (factors or {})
    # a factor on the input of attention is one on queries, keys and values
    attention = Part(
        "attention", gain=c["attention_in"] * c["attention_out"], heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, rope=rope or Rope(1e11), scale=c["key"] * c["attention_in"] ** 2 * head_dim**-0.5,
    )  # fmt: skip
    mamba = Part(
        "mamba2", gain=c["ssm_out"], heads=mamba_heads, head_dim=mamba_dim, state=state, groups=groups,
        taps=taps, norm=norm, norm_eps=eps, steps=steps, conv_bias=conv_bias,
        scales=tuple(c["ssm_in"] * x for x in c["ssm"]),
    )  # fmt: skip
    return Config(
        name="falcon_h1",
        vocab=vocab,
        width=width,
        pattern="P",
        depth=depth,
        mixers={"P": Part("side_by_side", parts={"mamba": mamba, "attention": attention})},
        feed_forwards={
            "F": Part("gated", gain=c["down"], hidden=hidden, activation=act, bias=bias, gate_scale=c["gate"])
        },
        norm=Norm("rms", eps=eps),
        embedding_scale=c["embedding"],
        logit_scale=c["head"],
        tie=tie,
    )


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=3, heads=4, kv_heads=2, head_dim=8, hidden=48, mamba_heads=6, mamba_dim=8,
        state=8, groups=2, factors=dict(key=0.5, ssm_in=1.25, gate=0.9, ssm=(0.4, 0.3, 0.4, 0.5, 0.4)),
    ),
    "0.5b": config(
        vocab=32_784, width=1024, depth=36, heads=8, kv_heads=2, head_dim=64, hidden=2048, mamba_heads=24,
        mamba_dim=64, state=128,
        factors=dict(
            embedding=2**2.5, head=5 / 128, key=25 / 64, attention_out=15 / 16, ssm_in=1.25,
            ssm_out=2**0.5 / 6, ssm=(2**-1.5, 0.25, 2**-1.5, 0.5, 2**-1.5), gate=0.625 * 2**0.5,
            down=75 / 128,
        ),
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `FalconH1Config`.

    Raises:
        ValueError: biases that ours does not have.
    """
    if theirs.attention_bias or theirs.mamba_proj_bias or theirs.projectors_bias:
        raise ValueError(
            "expected attention_bias, mamba_proj_bias and projectors_bias False, as in the published models"
        )
    width, gates = theirs.hidden_size, {True: "before", False: "after"}
    gate, down = theirs.mlp_multipliers
    return config(
        vocab=theirs.vocab_size,
        width=width,
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or width // theirs.num_attention_heads,
        hidden=theirs.intermediate_size,
        mamba_heads=theirs.mamba_n_heads,
        mamba_dim=theirs.mamba_d_head,
        state=theirs.mamba_d_state,
        groups=theirs.mamba_n_groups,
        taps=theirs.mamba_d_conv,
        norm=gates[theirs.mamba_norm_before_gate] if theirs.mamba_rms_norm else None,
        steps=tuple(theirs.time_step_limit),
        conv_bias=theirs.mamba_conv_bias,
        bias=theirs.mlp_bias,
        act=activation(theirs.hidden_act),
        rope=rope(theirs.rope_parameters),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
        factors=dict(
            embedding=theirs.embedding_multiplier,
            head=theirs.lm_head_multiplier,
            attention_in=theirs.attention_in_multiplier,
            key=theirs.key_multiplier,
            attention_out=theirs.attention_out_multiplier,
            ssm_in=theirs.ssm_in_multiplier,
            ssm=tuple(theirs.ssm_multipliers),
            ssm_out=theirs.ssm_out_multiplier,
            gate=gate,
            down=down,
        ),
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `FalconH1ForCausalLM` go."""
    theirs, ours = "model.layers.{i}", "blocks.{i}.mixer.parts"
    groups = config.mixers["P"].options["parts"]["mamba"].options["groups"]
    return [
        *ends(),
        Rule("model.final_layernorm.weight", "norm.weight"),
        *mamba2(f"{theirs}.mamba", f"{ours}.mamba", groups),
        Rule(f"{theirs}.self_attn.*", f"{ours}.attention.*"),
        Rule(f"{theirs}.feed_forward.*", "blocks.{i}.feed_forward.*"),
        Rule(f"{theirs}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
        Rule(f"{theirs}.pre_ff_layernorm.weight", "blocks.{i}.feed_forward_norm.weight"),
    ]
