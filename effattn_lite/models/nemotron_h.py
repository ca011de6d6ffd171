"""Nemotron-H: one part a layer, Mamba-2, attention or a feed-forward, each with its own norm.

Of 52 layers 24 are Mamba-2, 24 feed-forwards of squared ReLU without a gate, and 4 attention without
positions. The pattern is written as the published configurations write it: "M", "-" and "*".

Source: NVIDIA 2025, arXiv:2504.03624; sizes from the published configurations. The class of transformers cuts
steps below `time_step_min` when it reads a text and not when it goes on from a cache; ours always does.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule, activation, letters, mamba2

TYPES = ("nemotron_h",)
LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def config(
    *, vocab, width, pattern=PATTERN, heads, kv_heads, head_dim, hidden, mamba_heads, mamba_dim=64, state=128,
    groups=8, taps=4, steps=(0.0, float("inf")), act="relu2", bias=False,
    mamba_bias=False, conv_bias=True, eps=1e-5, tie=False,
):  # fmt: skip
    """Nemotron-H of some size: Mamba-2 "M", attention "*", feed-forward "-"."""
    return Config(
        name="nemotron_h",
        vocab=vocab,
        width=width,
        pattern=pattern,
        feeds="".join("-" if letter == "-" else "." for letter in pattern),
        mixers={
            "M": Part(
                "mamba2", heads=mamba_heads, head_dim=mamba_dim, state=state, groups=groups, taps=taps,
                steps=steps, bias=mamba_bias, conv_bias=conv_bias, norm_eps=eps,
            ),
            "*": Part("attention", heads=heads, kv_heads=kv_heads, head_dim=head_dim),
            "-": None,
        },
        feed_forwards={"-": Part("plain", hidden=hidden, activation=act, bias=bias), ".": None},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(
        vocab=64, width=32, pattern="M-M*-M-", heads=4, kv_heads=2, head_dim=8, hidden=64, mamba_heads=6,
        mamba_dim=8, state=8, groups=2,
    ),
    "4b": config(
        vocab=131_072, width=3072, heads=32, kv_heads=8, head_dim=128, hidden=12_288, mamba_heads=112
    ),
    "8b": config(
        vocab=131_072, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=21_504, mamba_heads=128
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `NemotronHConfig`.

    Raises:
        ValueError: layers that are mixtures of experts, or a window.
    """
    if theirs.sliding_window:
        raise ValueError(f"sliding_window is {theirs.sliding_window}, expected None")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layers_block_type, LETTERS),
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden=theirs.intermediate_size,
        mamba_heads=theirs.mamba_num_heads,
        mamba_dim=theirs.mamba_head_dim,
        state=theirs.ssm_state_size,
        groups=theirs.n_groups,
        taps=theirs.conv_kernel,
        steps=(theirs.time_step_min, float("inf")),
        act=activation(theirs.mlp_hidden_act),
        bias=theirs.mlp_bias,
        mamba_bias=theirs.use_bias,
        conv_bias=theirs.use_conv_bias,
        eps=theirs.layer_norm_epsilon,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `NemotronHForCausalLM` go; its files say `backbone` for `model`."""
    head = Rule("lm_head.weight", "head.weight")
    return [head, *(rule for root in ("model", "backbone") for rule in _below(root, config))]


def _below(root, config):
    parts = ["feed_forward" if layer.mixer is None else "mixer" for layer in config.layers]
    feeds = [i for i, part in enumerate(parts) if part == "feed_forward"]
    return [
        Rule(f"{root}.embeddings.weight", "embedding.weight"),
        Rule(f"{root}.norm_f.weight", "norm.weight"),
        *(
            Rule(f"{root}.layers.{i}.norm.weight", f"blocks.{i}.{part}_norm.weight")
            for i, part in enumerate(parts)
        ),
        *(Rule(f"{root}.layers.{i}.mixer.*", f"blocks.{i}.feed_forward.*") for i in feeds),
        *mamba2(f"{root}.layers.{{i}}.mixer", "blocks.{i}.mixer", config.mixers["M"].options["groups"]),
    ]
