"""Command A: three layers of a window with positions to one that sees all and has none.

Only windowed layers turn their queries and keys; the full ones find by content, whatever the distance.
Attention and feed-forward read the same norm and are added together.

Source: Cohere 2025, arXiv:2504.00698; Yang et al. 2025, arXiv:2501.18795; sizes of Command R7B, the small
model of this kind, from its published configuration.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, rope

TYPES = ("cohere2",)
LETTERS = {"sliding_attention": "W", "full_attention": "A"}


def config(
    *, vocab, width, depth, heads, kv_heads, hidden, window, head_dim=None, pattern="WWWA", turns=None,
    logit_scale=0.25, act="silu", eps=1e-5, bias=False, tie=True,
):  # fmt: skip
    """Command A of some size: windowed layers "W" that turn, full ones "A" that do not."""
    common = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
    return Config(
        name="command_a",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        mixers={
            "W": Part("attention", window=window, rope=turns or Rope(50_000.0, adjacent=True), **common),
            "A": Part("attention", **common),
        },
        feed_forwards={"F": Part("gated", hidden=hidden, activation=act)},
        norm=Norm("layer", eps=eps),
        placement="parallel",
        tie=tie,
        logit_scale=logit_scale,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, heads=4, kv_heads=2, hidden=64, window=8),
    "r7b": config(vocab=256_000, width=4096, depth=32, heads=32, kv_heads=8, hidden=14_336, window=4096),
}


def from_config(theirs) -> Config:
    """Ours of a `Cohere2Config`."""
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None),
        hidden=theirs.intermediate_size,
        window=theirs.sliding_window,
        turns=rope(theirs.rope_parameters, adjacent=True),
        logit_scale=theirs.logit_scale,
        act=activation(theirs.hidden_act),
        eps=theirs.layer_norm_eps,
        bias=theirs.attention_bias,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Cohere2ForCausalLM` go."""
    return [
        *ends(),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule("model.layers.{i}.mlp.*", "blocks.{i}.feed_forward.*"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
    ]
