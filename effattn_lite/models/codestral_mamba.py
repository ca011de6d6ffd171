"""Codestral Mamba: 64 layers of Mamba-2 and nothing else, trained on code.

128 heads of 64 channels read and write through 8 groups of B and C, which are the groups of the gated norm
too.

Source: Mistral AI 2024, the release of Codestral Mamba; block of Dao and Gu 2024, arXiv:2405.21060; sizes
from the published configuration of Mamba-Codestral-7B-v0.1.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule, mamba2

TYPES = ("mamba2",)


def config(
    *, vocab, width, depth, heads, state=128, groups=8, expand=2, taps=4, bias=False, conv_bias=True,
    steps=(0.0, float("inf")), eps=1e-5, tie=False,
):  # fmt: skip
    """Codestral Mamba of some size: Mamba-2 "M", no feed-forward."""
    return Config(
        name="codestral_mamba",
        vocab=vocab,
        width=width,
        pattern="M",
        depth=depth,
        feeds=".",
        mixers={
            "M": Part(
                "mamba2", heads=heads, state=state, groups=groups, expand=expand, taps=taps, bias=bias,
                conv_bias=conv_bias, steps=steps, norm_eps=eps,
            )
        },
        feed_forwards={".": None},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, heads=8, state=8, groups=2),
    "7b": config(vocab=32_768, width=4096, depth=64, heads=128),
}


def from_config(theirs) -> Config:
    """Ours of a `Mamba2Config`."""
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        heads=theirs.num_heads,
        state=theirs.state_size,
        groups=theirs.n_groups,
        expand=theirs.expand,
        taps=theirs.conv_kernel,
        bias=theirs.use_bias,
        conv_bias=theirs.use_conv_bias,
        eps=theirs.layer_norm_epsilon,
        steps=tuple(theirs.time_step_limit),
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `Mamba2ForCausalLM` go."""
    return [
        Rule("backbone.embeddings.weight", "embedding.weight"),
        Rule("backbone.norm_f.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight"),
        Rule("backbone.layers.{i}.norm.weight", "blocks.{i}.mixer_norm.weight"),
        *mamba2("backbone.layers.{i}.mixer", "blocks.{i}.mixer", config.mixers["M"].options["groups"]),
    ]
