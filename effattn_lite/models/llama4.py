"""Llama 4: three layers that see their own chunk of the text to one that sees all, and mixtures of experts.

Chunked layers turn queries and keys, then give each a root mean square of 1; the full ones have no positions,
but their queries grow slowly with the position, so that a softmax over more keys stays as sharp. A token goes
to one routed expert, whose input, not output, is weighted by a sigmoid, and to a shared one.

Source: Meta 2025, "The Llama 4 herd", which is no paper: formulas and sizes are those of the class in
transformers and of the published configurations. Scout is the base model; the instructed one has factor 16
and high 1.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, rope

TYPES = ("llama4_text",)
SCOUT = Rope(500_000.0, adjacent=True, scaling="llama3", factor=8.0, context=8192, low=1.0, high=4.0)
LETTERS = {"chunked_attention": "C", "full_attention": "A"}


def config(
    *, vocab, width, depth, heads, kv_heads, head_dim, hidden, experts, chunk, temperature=(0.1, 8192),
    top=1, dense=None, pattern="CCCA", feeds="E", turns=None, qk_norm=True, act="silu", eps=1e-5, bias=False,
    tie=False,
):  # fmt: skip
    """Llama 4 of some size: chunked "C" and full "A" layers; experts "E" of `hidden`, "F" of `dense`."""
    common = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
    near = dict(
        rope=turns or Rope(500_000.0, adjacent=True),
        qk_norm=Norm("rms", eps=eps, weight=False) if qk_norm else None,
    )
    return Config(
        name="llama4",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        feeds=feeds,
        mixers={
            "C": Part("attention", chunk=chunk, **near, **common),
            "A": Part("attention", temperature=temperature, **common),
        },
        feed_forwards={
            "E": Part(
                "experts", hidden=hidden, experts=experts, top=top, activation=act, scores="sigmoid",
                weigh="input", shared=hidden,
            ),
            "F": Part("gated", hidden=dense or 2 * hidden, activation=act),
        },
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, depth=4, heads=4, kv_heads=2, head_dim=8, hidden=32, experts=4, chunk=16,
        temperature=(0.1, 8), feeds="FE",
    ),
    "scout": config(
        vocab=202_048, width=5120, depth=48, heads=40, kv_heads=8, head_dim=128, hidden=8192, experts=16,
        chunk=8192, turns=SCOUT,
    ),
    "maverick": config(
        vocab=202_048, width=5120, depth=48, heads=40, kv_heads=8, head_dim=128, hidden=8192, experts=128,
        chunk=8192, feeds="FE", qk_norm=False,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `Llama4TextConfig`.

    Raises:
        ValueError: layers that see all but turn, or the other way round.
    """
    pattern = letters(theirs.layer_types, LETTERS)
    if [letter == "C" for letter in pattern] != [bool(turned) for turned in theirs.no_rope_layers]:
        raise ValueError(
            f"layers {pattern} and no_rope_layers {theirs.no_rope_layers}: expected 1 where chunked"
        )
    tuned = theirs.attn_temperature_tuning
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=pattern,
        feeds="".join("E" if i in theirs.moe_layers else "F" for i in range(theirs.num_hidden_layers)),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden=theirs.intermediate_size,
        dense=theirs.intermediate_size_mlp,
        experts=theirs.num_local_experts,
        top=theirs.num_experts_per_tok,
        chunk=theirs.attention_chunk_size,
        temperature=(theirs.attn_scale, theirs.floor_scale) if tuned else None,
        turns=rope(theirs.rope_parameters, adjacent=True),
        qk_norm=theirs.use_qk_norm,
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        bias=theirs.attention_bias,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Llama4ForCausalLM` go."""
    theirs, ours = "model.layers.{i}.feed_forward", "blocks.{i}.feed_forward"
    return [
        *ends(),
        Rule("model.layers.{i}.self_attn.*", "blocks.{i}.mixer.*"),
        Rule(f"{theirs}.router.*", f"{ours}.router.*"),
        Rule(f"{theirs}.shared_expert.*", f"{ours}.shared.*"),
        Rule(
            f"{theirs}.experts.gate_up_proj", (f"{ours}.gate", f"{ours}.up"), lambda x: x.mT.chunk(2, dim=1)
        ),
        Rule(f"{theirs}.experts.down_proj", f"{ours}.down", lambda x: x.mT),
        Rule(f"{theirs}.*", f"{ours}.*"),
        Rule("model.layers.{i}.input_layernorm.*", "blocks.{i}.mixer_norm.*"),
        Rule("model.layers.{i}.post_attention_layernorm.*", "blocks.{i}.feed_forward_norm.*"),
    ]
