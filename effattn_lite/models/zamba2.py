"""Zamba2: Mamba-2 all the way, and before every sixth layer an attention block whose weights are the same.

The shared block reads the stream and the embedding side by side, twice the width; what it says is added to
the input of that layer's Mamba-2, not to the stream. Each use has corrections of low rank of its own. In the
larger models two shared blocks take turns.

Source: Glorioso et al. 2024, arXiv:2411.15242; sizes from the published configurations. The class of
transformers cuts steps below `time_step_min` when it reads a text and not when it goes on from a cache; ours
always does.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, activation, ends, letters, mamba2, rope

TYPES = ("zamba2",)
LETTERS = {"linear_attention": "M", "hybrid": "H"}
SHARED = (
    "attention_norm", "attention.q_proj.base", "attention.k_proj.base", "attention.v_proj.base",
    "attention.o_proj", "feed_forward_norm", "feed_forward.gate_proj.base", "feed_forward.up_proj.base",
    "feed_forward.down_proj",
)  # fmt: skip
"""What the uses of a shared block have in common."""


def config(
    *, vocab, width, pattern, mamba_heads, state, groups=1, expand=2, taps=4, steps=(0.0, float("inf")),
    heads, kv_heads=None, hidden, blocks=1, rank=128, attention_rank=0, rope=None, act="gelu", eps=1e-5,
    tie=True,
):  # fmt: skip
    """Zamba2 of some size: Mamba-2 "M", and "H" with one of the shared `blocks`, in turn, before it."""
    norm = Norm("rms", eps=eps)
    mamba = dict(heads=mamba_heads, state=state, groups=groups, expand=expand, taps=taps, steps=steps)
    uses = [i for i, letter in enumerate(pattern) if letter == "H"]
    return Config(
        name="zamba2",
        vocab=vocab,
        width=width,
        pattern=pattern,
        mixers={
            "M": Part("mamba2", **mamba),
            "H": Part(
                "shared_attention", mamba=mamba, heads=heads, kv_heads=kv_heads, hidden=hidden, rank=rank,
                attention_rank=attention_rank, rope=rope, activation=act, norm=norm,
            ),
        },
        feeds=".",
        feed_forwards={".": None},
        norm=norm,
        tie=tie,
        same={
            f"blocks.{use}.mixer.{name}": f"blocks.{uses[n % blocks]}.mixer.{name}"
            for n, use in enumerate(uses)
            for name in SHARED
            if n >= blocks
        },
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, pattern="MHMHMH", mamba_heads=8, state=8, heads=4, hidden=48, blocks=2, rank=4,
        attention_rank=2, rope=Rope(1e4),
    ),
    "1.2b": config(
        vocab=32_000, width=2048, pattern="MMMMM" + "HMMMMM" * 5 + "HMM", mamba_heads=64, state=128, heads=32,
        hidden=8192, attention_rank=128, rope=Rope(1e4),
    ),
    "2.7b": config(
        vocab=32_000, width=2560, pattern="M" + "MMMMMH" * 7 + "MMMMHMMMHMM", mamba_heads=80, state=64,
        heads=32, hidden=10_240, blocks=2,
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `Zamba2Config`.

    Raises:
        ValueError: biases that ours does not have.
    """
    if theirs.add_bias_linear:
        raise ValueError("expected add_bias_linear False, as in the published models")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layers_block_type, LETTERS),
        mamba_heads=theirs.n_mamba_heads,
        state=theirs.mamba_d_state,
        groups=theirs.mamba_ngroups,
        expand=theirs.mamba_expand,
        taps=theirs.mamba_d_conv,
        steps=(theirs.time_step_min, float("inf")),
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        hidden=theirs.intermediate_size,
        blocks=theirs.num_mem_blocks,
        rank=theirs.adapter_rank,
        attention_rank=theirs.adapter_rank if theirs.use_shared_attention_adapter else 0,
        rope=rope(theirs.rope_parameters) if theirs.use_mem_rope else None,
        act=activation(theirs.hidden_act),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Zamba2ForCausalLM` go."""
    groups = config.mixers["M"].options["groups"]
    theirs, ours = "model.layers.{i}", "blocks.{i}.mixer"
    block = f"{theirs}.shared_transformer"
    both = tuple(f"{ours}.feed_forward.{name}_proj.base.weight" for name in ("gate", "up"))
    own = f"{ours}.attention"
    uses = [layer.index for layer in config.layers if layer.letter == "H"]
    first = [i for i in uses if f"blocks.{i}.mixer.{SHARED[0]}" not in config.same]
    return [
        *ends(),
        Rule("model.final_layernorm.weight", "norm.weight"),
        Rule(f"{theirs}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
        *mamba2(f"{theirs}.mamba", ours, groups),
        Rule(f"{theirs}.mamba_decoder.input_layernorm.weight", f"{ours}.norm.weight"),
        *mamba2(f"{theirs}.mamba_decoder.mamba", f"{ours}.mamba", groups),
        Rule(f"{theirs}.linear.weight", f"{ours}.linear.weight"),
        Rule(f"{block}.input_layernorm.weight", f"{ours}.attention_norm.weight"),
        *(Rule(f"{block}.self_attn.{x}_proj.weight", f"{own}.{x}_proj.base.weight") for x in "qkv"),
        Rule(f"{block}.self_attn.o_proj.weight", f"{own}.o_proj.weight"),
        Rule(f"{block}.pre_ff_layernorm.weight", f"{ours}.feed_forward_norm.weight"),
        Rule(f"{block}.feed_forward.gate_up_proj.weight", both, lambda x: x.chunk(2)),
        Rule(f"{block}.feed_forward.down_proj.weight", f"{ours}.feed_forward.down_proj.weight"),
        *(rule for n, i in enumerate(uses) for rule in corrections(n, i, first[n % len(first)])),
        # a shared block lists the corrections of all its uses; in memory, again at each later use
        *(Rule(f"{block}.self_attn.linear_{x}_adapter_list.*", None) for x in "qkv"),
        Rule(f"{block}.feed_forward.gate_up_proj_adapter_list.*", None),
    ]


def corrections(n: int, i: int, first: int) -> list[Rule]:
    """Where the corrections of use n, in layer i, go; they stand in the layer of its block's first use."""
    theirs, ours = f"model.layers.{first}.shared_transformer", f"blocks.{i}.mixer"
    lists = {x: f"{theirs}.self_attn.linear_{x}_adapter_list.{n}" for x in "qkv"}
    gate, up = (f"{ours}.feed_forward.{name}_proj" for name in ("gate", "up"))
    pair = f"{theirs}.feed_forward.gate_up_proj_adapter_list.{n}"
    return [
        *(Rule(f"{name}.0.weight", f"{ours}.attention.{x}_proj.narrow.weight") for x, name in lists.items()),
        *(Rule(f"{name}.1.weight", f"{ours}.attention.{x}_proj.widen.weight") for x, name in lists.items()),
        Rule(f"{pair}.0.weight", f"{gate}.narrow.weight"),
        Rule(f"{pair}.1.weight", (f"{gate}.widen.weight", f"{up}.widen.weight"), lambda x: x.chunk(2)),
    ]
