"""Gemma 3: five layers of a short window to one that sees all, and four norms a layer.

Windowed layers turn by base 1e4, the full ones by 1e6. Queries and keys are normed before they turn, which
replaces Gemma 2's caps. Norms store their weight minus one; the embedding is scaled by the root of the width.

Source: Gemma Team 2025, arXiv:2503.19786; sizes from the published configurations.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, rope

TYPES = ("gemma3_text",)
NEAR, FAR = Rope(10_000.0), Rope(1_000_000.0)
LETTERS = {"sliding_attention": "W", "full_attention": "A"}


def config(
    *, vocab, width, pattern, depth, heads, kv_heads, head_dim, hidden, window, scale=None,
    near=NEAR, far=FAR, act="gelu_tanh", eps=1e-6, bias=False, **more,
):  # fmt: skip
    """Gemma 3 of some size: windowed layers "W" with positions `near`, full ones "A" with `far`."""
    norm = Norm("rms", eps=eps, offset=1.0)
    common = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, qk_norm=norm, bias=bias)
    return Config(
        name="gemma3",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        mixers={
            "W": Part("attention", window=window, rope=near, **common),
            "A": Part("attention", rope=far, **common),
        },
        feed_forwards={"F": Part("gated", hidden=hidden, activation=act)},
        norm=norm,
        placement="pre_post",
        embedding_scale=width**0.5,
        **{"tie": True} | more,
    )


PRESETS = {
    "tiny": config(
        vocab=64, width=32, pattern="WWWWWA", depth=6, heads=4, kv_heads=2, head_dim=8, hidden=64, window=8
    ),
    "270m": config(
        vocab=262_144, width=640, pattern="WWWWWA", depth=18, heads=4, kv_heads=1, head_dim=256, hidden=2048,
        window=512,
    ),
    "1b": config(
        vocab=262_144, width=1152, pattern="WWWWWA", depth=26, heads=4, kv_heads=1, head_dim=256, hidden=6912,
        window=512,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `Gemma3TextConfig`."""
    turns = theirs.rope_parameters
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden=theirs.intermediate_size,
        window=theirs.sliding_window,
        scale=theirs.query_pre_attn_scalar**-0.5,
        near=rope(turns["sliding_attention"]),
        far=rope(turns["full_attention"]),
        act=activation(theirs.hidden_activation),
        eps=theirs.rms_norm_eps,
        bias=theirs.attention_bias,
        tie=theirs.tie_word_embeddings,
        logit_softcap=theirs.final_logit_softcapping,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Gemma3ForCausalLM` go."""
    return [
        *ends(),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule("model.layers.{i}.mlp.*", "blocks.{i}.feed_forward.*"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.mixer_post_norm.*"),
        Rule("model.layers.{i}.pre_feedforward_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
        Rule("model.layers.{i}.post_feedforward_layernorm.*", "blocks.{i}.feed_forward_post_norm.*"),
    ]
