"""Llama: the plain decoder that the others are measured against; SmolLM2 and Mistral are of its kind.

Every layer is rotary attention with grouped heads, then a gated feed-forward, a norm before each.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; Jiang et al. 2023, arXiv:2310.06825, section 2 and
table 1 (the window); Ben Allal et al. 2025, arXiv:2502.02737, with the sizes of its published configuration.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, rope

TYPES = ("llama", "mistral")


def config(
    *, vocab, width, depth, heads, kv_heads, hidden, head_dim=None, turns=None, window=None, bias=False,
    act="silu", eps=1e-5, tie=False,
):  # fmt: skip
    """Llama of some size; with `window`, Mistral."""
    attention = Part(
        "attention", heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=turns or Rope(), window=window,
        bias=bias,
    )  # fmt: skip
    return Config(
        name="llama",
        vocab=vocab,
        width=width,
        pattern="A" if window is None else "W",
        depth=depth,
        mixers={"A" if window is None else "W": attention},
        feed_forwards={"F": Part("gated", hidden=hidden, activation=act)},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, heads=4, kv_heads=2, hidden=64),
    "smollm2_135m": config(
        vocab=49_152, width=576, depth=30, heads=9, kv_heads=3, hidden=1536, turns=Rope(100_000.0), tie=True
    ),
    "mistral_7b": config(
        vocab=32_000, width=4096, depth=32, heads=32, kv_heads=8, hidden=14_336, window=4096
    ),
}


def from_config(theirs) -> Config:
    """Ours of a `LlamaConfig` or a `MistralConfig`.

    Raises:
        ValueError: biases in the feed-forward.
    """
    if getattr(theirs, "mlp_bias", False):
        raise ValueError("mlp_bias is True, expected False as in the published models")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden=theirs.intermediate_size,
        turns=rope(theirs.rope_parameters),
        window=getattr(theirs, "sliding_window", None),
        bias=getattr(theirs, "attention_bias", False),
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `LlamaForCausalLM` go."""
    return [
        *ends(),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule("model.layers.{i}.mlp.*", "blocks.{i}.feed_forward.*"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]


def gguf_weights(config: Config) -> list[Rule]:
    """Where the tensors of a GGUF file of such a model go, once rotary pairs are (i, i + K / 2) again."""
    mixer, feed = "blocks.{i}.mixer", "blocks.{i}.feed_forward"
    return [
        Rule("token_embd.weight", "embedding.weight"),
        Rule("output_norm.weight", "norm.weight"),
        Rule("output.weight", "head.weight"),
        *(Rule(f"blk.{{i}}.attn_{x}.weight", f"{mixer}.{x}_proj.weight") for x in "qkv"),
        Rule("blk.{i}.attn_output.weight", f"{mixer}.o_proj.weight"),
        *(Rule(f"blk.{{i}}.ffn_{x}.weight", f"{feed}.{x}_proj.weight") for x in ("gate", "up", "down")),
        Rule("blk.{i}.attn_norm.weight", "blocks.{i}.mixer_norm.weight"),
        Rule("blk.{i}.ffn_norm.weight", "blocks.{i}.feed_forward_norm.weight"),
    ]
