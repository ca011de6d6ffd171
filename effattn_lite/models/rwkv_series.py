"""RWKV-4 to RWKV-7: recurrent in time, and in both halves of a layer a look at the token before.

4 averages every channel by itself; 5, Eagle, keeps a matrix a head; 6, Finch, lets the token choose how fast
it fades; 7, Goose, erases before it writes, by a delta rule, and mixes the first layer's values into all
later ones. Embeddings are normed, and all norms are layer norms with a bias.

Source: Peng et al. 2023, arXiv:2305.13048; 2024, arXiv:2404.05892; 2025, arXiv:2503.14456. The ranks of the
preset of RWKV-7 are unverified, but give its published number of weights.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule

TYPES = ("rwkv",)


def config(*, version, vocab, width, depth, heads=None, hidden=None, eps=1e-5, tie=False, **options):
    """RWKV of a version, 4 to 7, and some size; heads of 64 and the authors' `hidden` are the default.

    `options` are those of the version's time mixing, as the ranks of what the token chooses.
    """
    if version not in (4, 5, 6, 7):
        raise ValueError(f"version is {version}, expected 4, 5, 6 or 7")
    if version > 4:
        options["heads"] = heads or width // 64
    # their 3.5 times the width is rounded down to a multiple of 32
    hidden = hidden or (4 * width if version in (4, 7) else 7 * width // 64 * 32)
    norm = Norm("layer", eps=eps, bias=True)
    return Config(
        name="rwkv_series",
        vocab=vocab,
        width=width,
        pattern="R",
        depth=depth,
        mixers={"R": Part(f"rwkv{version}", **options)},
        feed_forwards={"F": Part("channel_mixing", hidden=hidden, gate=version < 7)},
        norm=norm,
        embedding_norm=norm,
        tie=tie,
    )


TINY = dict(vocab=64, width=32, depth=4)
PRESETS = {
    "tiny": config(version=4, hidden=64, **TINY),
    "tiny5": config(version=5, heads=2, hidden=64, **TINY),
    "tiny6": config(version=6, heads=2, hidden=64, mix_rank=4, decay_rank=8, **TINY),
    "tiny7": config(
        version=7, heads=2, hidden=64, decay_rank=8, rate_rank=8, gate_rank=8, value_rank=4, **TINY
    ),
    "4-169m": config(version=4, vocab=50_277, width=768, depth=12),
    "4-14b": config(version=4, vocab=50_277, width=5120, depth=40),
    "5-1.5b": config(version=5, vocab=65_536, width=2048, depth=24),
    "6-1.6b": config(version=6, vocab=65_536, width=2048, depth=24),
    "7-1.5b": config(
        version=7,
        vocab=65_536,
        width=2048,
        depth=24,
        decay_rank=96,
        rate_rank=96,
        gate_rank=256,
        value_rank=64,
    ),
}


def from_config(theirs) -> Config:
    """Ours of a `RwkvConfig`, which is RWKV-4.

    Their model divides weights of later layers when it first runs in evaluation mode (`rescale_every`):
    convert it before, or set that to 0.

    Raises:
        ValueError: channels of attention that are not the model's, or an eps that is not 1e-5, which their
            last norm has in any case.
    """
    if theirs.layer_norm_epsilon != 1e-5:
        raise ValueError(f"layer_norm_epsilon is {theirs.layer_norm_epsilon}, expected 1e-5")
    if theirs.attention_hidden_size != theirs.hidden_size:
        raise ValueError(
            f"attention_hidden_size is {theirs.attention_hidden_size}, expected {theirs.hidden_size}"
        )
    return config(
        version=4,
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        hidden=theirs.intermediate_size,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `RwkvForCausalLM` go."""
    block, ours = "rwkv.blocks.{i}", "blocks.{i}"

    def shares(*theirs):
        import torch

        # theirs is the share of this token, ours that of the one before
        return 1 - torch.cat(theirs).flatten(1)

    def mixing(name, roles):
        return tuple(f"{block}.{name}.time_mix_{role}" for role in roles)

    names = {"key": "k_proj", "value": "v_proj", "receptance": "r_proj", "output": "o_proj"}
    return [
        Rule("rwkv.embeddings.weight", "embedding.weight"),
        Rule("rwkv.blocks.0.pre_ln.*", "embedding_norm.*"),
        Rule("rwkv.ln_out.*", "norm.*"),
        Rule("head.weight", "head.weight"),
        Rule(f"{block}.ln1.*", f"{ours}.mixer_norm.*"),
        Rule(f"{block}.ln2.*", f"{ours}.feed_forward_norm.*"),
        Rule(mixing("attention", ("key", "value", "receptance")), f"{ours}.mixer.mu", shares),
        Rule(mixing("feed_forward", ("key", "receptance")), f"{ours}.feed_forward.mu", shares),
        Rule(f"{block}.attention.time_decay", f"{ours}.mixer.omega"),
        Rule(f"{block}.attention.time_first", f"{ours}.mixer.u"),
        *(Rule(f"{block}.attention.{name}.*", f"{ours}.mixer.{own}.*") for name, own in names.items()),
        *(
            Rule(f"{block}.feed_forward.{name}.*", f"{ours}.feed_forward.{own}.*")
            for name, own in names.items()
        ),
    ]
