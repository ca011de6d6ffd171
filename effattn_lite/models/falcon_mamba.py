"""Falcon Mamba: Mamba and nothing else, 64 layers of it, with norms on what selects.

A layer is one block: no feed-forward follows it. The step, B and C are RMS-normalised inside, by norms
without weights, so that none of the three can grow without bound. Without them it is Mamba as it was first
released, which the recipe reads too.

Source: Zuo et al. 2024, arXiv:2410.05355; Gu and Dao 2023, arXiv:2312.00752; sizes from the published
configurations of Falcon3-Mamba-7B and mamba-2.8b.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule

TYPES = ("falcon_mamba", "mamba")


def config(
    *, vocab, width, depth, states=16, conv_size=4, expand=2, rank=None, inner_eps=1e-5, eps=1e-5, tie=False
):
    """Falcon Mamba of some size: Mamba "M", no feed-forward; with `inner_eps` None, Mamba."""
    return Config(
        name="falcon_mamba",
        vocab=vocab,
        width=width,
        pattern="M",
        depth=depth,
        feeds=".",
        mixers={
            "M": Part(
                "mamba", states=states, conv_size=conv_size, expand=expand, rank=rank, norm_eps=inner_eps,
                norm_weight=False,
            )
        },
        feed_forwards={".": None},
        norm=Norm("rms", eps=eps),
        tie=tie,
    )  # fmt: skip


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, states=8),
    "7b": config(vocab=65_024, width=4096, depth=64),
    "mamba_2.8b": config(vocab=50_280, width=2560, depth=64, inner_eps=None, tie=True),
}


def from_config(theirs) -> Config:
    """Ours of a `FalconMambaConfig` or a `MambaConfig`.

    Raises:
        ValueError: biases that ours does not have.
    """
    if theirs.use_bias or not theirs.use_conv_bias:
        raise ValueError("expected use_bias False and use_conv_bias True, as in the published models")
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        states=theirs.state_size,
        conv_size=theirs.conv_kernel,
        expand=theirs.intermediate_size // theirs.hidden_size,
        rank=theirs.time_step_rank,
        inner_eps=getattr(theirs, "mixer_rms_eps", None),
        eps=theirs.layer_norm_epsilon,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `FalconMambaForCausalLM` or a `MambaForCausalLM` go."""
    theirs, ours = "backbone.layers.{i}.mixer", "blocks.{i}.mixer"
    return [
        Rule("backbone.embeddings.weight", "embedding.weight"),
        Rule("backbone.norm_f.weight", "norm.weight"),
        Rule("lm_head.weight", "head.weight"),
        Rule("backbone.layers.{i}.norm.weight", "blocks.{i}.mixer_norm.weight"),
        Rule(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", lambda x: x.squeeze(1)),
        Rule(f"{theirs}.conv1d.bias", f"{ours}.conv.bias"),
        Rule(f"{theirs}.*", f"{ours}.*"),
    ]
