"""gpt-oss: a window of 128 tokens and the whole text in turn, learned sinks, and four experts a token.

Each head has a logit of its own in the denominator of the softmax, where its weight can go when no key
matches. Positions are stretched by YaRN in all layers. Experts have biases and a clipped gate.

Source: OpenAI 2025, arXiv:2508.10925; sizes from the published configurations.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, ends, letters, rope

TYPES = ("gpt_oss",)
LETTERS = {"sliding_attention": "W", "full_attention": "A"}
YARN = Rope(150_000.0, scaling="yarn", factor=32.0, context=4096, low=1.0, high=32.0, truncate=False)


def config(
    *, vocab, width, depth, heads, kv_heads, head_dim, hidden, experts, window, top=4, pattern="WA",
    turns=YARN, eps=1e-5, bias=True, tie=False,
):  # fmt: skip
    """gpt-oss of some size: windowed "W" and full "A" layers, all with sinks."""
    common = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=turns, sinks=True, bias=bias)
    return Config(
        name="gpt_oss",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        feeds="E",
        mixers={"W": Part("attention", window=window, **common), "A": Part("attention", **common)},
        feed_forwards={
            "E": Part(
                "experts", hidden=hidden, experts=experts, top=top, activation="clipped_silu", normalise=True,
                router_bias=True, bias=True,
            )
        },
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, kv_heads=2, head_dim=8, hidden=32, experts=4, top=2, window=8
    ),
    "20b": config(
        vocab=201_088, width=2880, depth=24, heads=64, kv_heads=8, head_dim=64, hidden=2880, experts=32,
        window=128,
    ),
    "120b": config(
        vocab=201_088, width=2880, depth=36, heads=64, kv_heads=8, head_dim=64, hidden=2880, experts=128,
        window=128,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `GptOssConfig`.

    Raises:
        ValueError: another gate than the published one.
    """
    if (theirs.swiglu_alpha, theirs.swiglu_limit) != (1.702, 7.0):
        gate = theirs.swiglu_alpha, theirs.swiglu_limit
        raise ValueError(f"swiglu_alpha and swiglu_limit are {gate}, expected 1.702 and 7")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden=theirs.intermediate_size,
        experts=theirs.num_local_experts,
        top=theirs.num_experts_per_tok,
        window=theirs.sliding_window,
        turns=rope(theirs.rope_parameters),
        eps=theirs.rms_norm_eps,
        bias=theirs.attention_bias,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `GptOssForCausalLM` go; gate and up alternate in theirs."""
    theirs, ours = "model.layers.{i}.mlp", "blocks.{i}.feed_forward"
    return [
        *ends(),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule(f"{theirs}.router.*", f"{ours}.router.*"),
        Rule(
            f"{theirs}.experts.gate_up_proj",
            (f"{ours}.gate", f"{ours}.up"),
            lambda x: (x[..., ::2].mT, x[..., 1::2].mT),
        ),
        Rule(
            f"{theirs}.experts.gate_up_proj_bias",
            (f"{ours}.gate_bias", f"{ours}.up_bias"),
            lambda x: (x[..., ::2], x[..., 1::2]),
        ),
        Rule(f"{theirs}.experts.down_proj", f"{ours}.down", lambda x: x.mT),
        Rule(f"{theirs}.experts.down_proj_bias", f"{ours}.down_bias"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]
