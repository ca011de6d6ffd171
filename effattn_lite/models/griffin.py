"""Griffin: two recurrent blocks to one of local attention, as RecurrentGemma was released.

The recurrence is a leaky sum a channel, no matrix: its state is as wide as the model. Attention has one head
of keys and values, a window, and turns half of a head's channels. Norms store their weight minus one; the
embedding is scaled by the root of the width, rounded to bfloat16 as in the released model.

Source: De et al. 2024, arXiv:2402.19427; Botev et al. 2024, arXiv:2404.07839; sizes from the published
configurations, whose `intermediate_size` is twice the entries between the products.
"""

import math

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, rope

TYPES = ("recurrent_gemma",)
LETTERS = {"linear_attention": "R", "sliding_attention": "W"}


def config(
    *, vocab, width, pattern="RRW", depth, heads, kv_heads, hidden, window, inner=None, taps=4,
    rope=None, bias=False, act="gelu_tanh", logit_softcap=30.0, eps=1e-6, tie=True,
):  # fmt: skip
    """Griffin of some size: recurrent "R" and windowed attention "W"; default positions turn half a head."""
    rope = rope or Rope(10_000.0, dims=width // heads // 2)
    return Config(
        name="griffin",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        mixers={
            "R": Part("rg_lru", inner=inner or width, heads=heads, taps=taps, activation=act),
            "W": Part(
                "attention", heads=heads, kv_heads=kv_heads, window=window, rope=rope, bias=bias,
                out_bias=True,
            ),
        },
        feed_forwards={"F": Part("gated", hidden=hidden, activation=act, bias=True)},
        norm=Norm("rms", eps=eps, offset=1.0),
        embedding_scale=bfloat16(width**0.5),
        logit_softcap=logit_softcap,
        tie=tie,
    )  # fmt: skip


def bfloat16(x: float) -> float:
    """x to eight significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(256 * mantissa), exponent - 8)


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=5, heads=4, kv_heads=1, hidden=48, window=8),
    "2b": config(vocab=256_000, width=2560, depth=26, heads=10, kv_heads=1, hidden=7680, window=2048),
    "9b": config(vocab=256_000, width=4096, depth=38, heads=16, kv_heads=1, hidden=12_288, window=2048),
}


def from_config(theirs) -> Config:
    """Ours of a `RecurrentGemmaConfig`."""
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layers_block_type, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        hidden=theirs.intermediate_size // 2,
        window=theirs.attention_window_size,
        inner=theirs.lru_width,
        taps=theirs.conv1d_width,
        rope=rope(theirs.rope_parameters, head_dim=theirs.head_dim),
        bias=theirs.attention_bias,
        act=activation(theirs.hidden_activation),
        logit_softcap=theirs.logits_soft_cap,
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `RecurrentGemmaForCausalLM` go."""
    theirs, ours = "model.layers.{i}.temporal_block", "blocks.{i}.mixer"
    return [
        *ends(),
        Rule("model.final_norm.weight", "norm.weight"),
        Rule("model.layers.{i}.temporal_pre_norm.weight", "blocks.{i}.mixer_norm.weight"),
        Rule("model.layers.{i}.channel_pre_norm.weight", "blocks.{i}.feed_forward_norm.weight"),
        Rule("model.layers.{i}.mlp_block.*", "blocks.{i}.feed_forward.*"),
        Rule(f"{theirs}.conv_1d.weight", f"{ours}.conv.weight", lambda x: x.squeeze(1)),
        Rule(f"{theirs}.conv_1d.bias", f"{ours}.conv.bias"),
        Rule(f"{theirs}.rg_lru.recurrent_param", f"{ours}.rate"),
        Rule(f"{theirs}.rg_lru.input_gate_*", f"{ours}.input_gate.*"),
        Rule(f"{theirs}.rg_lru.recurrent_gate_*", f"{ours}.leak_gate.*"),
        Rule(f"{theirs}.linear_x.*", f"{ours}.x_proj.*"),
        Rule(f"{theirs}.linear_y.*", f"{ours}.y_proj.*"),
        Rule(f"{theirs}.linear_out.*", f"{ours}.o_proj.*"),
        Rule(f"{theirs}.*", f"{ours}.*"),
    ]
