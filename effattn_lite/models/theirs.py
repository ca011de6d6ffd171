"""How the configurations and weights of transformers spell what all architectures share. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from effattn_lite.models.config import Rope

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


class Rule(NamedTuple):
    """Where a weight of theirs goes; `{i}` is the number of a layer, a last `*` the rest of a name.

    `{e}` is the number of an expert: the tensors of all of them become one, on a new first axis.

    A rule that finds none of its names in a layer says nothing about it.

    Attributes:
        theirs: name, or several, in their state dict.
        ours: name, or several, in ours; None reads over theirs.
        change: their tensors -> our tensor, or a tuple of them; default as they are.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...] | None
    change: Callable | None = None


def ends(theirs: str = "model") -> list[Rule]:
    """Embedding, last norm and head."""
    return [
        Rule(f"{theirs}.embed_tokens.weight", "embedding.weight"),
        Rule(f"{theirs}.norm.*", "norm.*"),
        Rule("lm_head.weight", "head.weight"),
    ]


def experts(
    theirs: str = "model.layers.{i}.mlp",
    ours: str = "blocks.{i}.feed_forward",
    files: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Rule]:
    """A mixture of experts with one for every token, or a dense network.

    Args:
        theirs: in memory, where their first two products are one, and in files.
        ours: in our model.
        files: names of an expert's products in files, which have the experts one by one.
    """
    return [
        *(
            Rule(f"{theirs}.experts.{{e}}.{name}.weight", f"{ours}.{own}")
            for name, own in zip(files, ("gate", "up", "down"), strict=True)
        ),
        Rule(f"{theirs}.gate.weight", f"{ours}.router.weight"),
        Rule(f"{theirs}.gate.e_score_correction_bias", f"{ours}.balance"),
        Rule(f"{theirs}.experts.gate_up_proj", (f"{ours}.gate", f"{ours}.up"), lambda x: x.chunk(2, dim=1)),
        Rule(f"{theirs}.experts.down_proj", f"{ours}.down"),
        Rule(f"{theirs}.shared_experts.*", f"{ours}.shared.*"),
        Rule(f"{theirs}.shared_expert.*", f"{ours}.shared.*"),
        Rule(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate.weight"),
        Rule(f"{theirs}.*", f"{ours}.*"),
    ]


def latent(theirs: str = "model.layers.{i}.self_attn", ours: str = "blocks.{i}.mixer") -> list[Rule]:
    """Multi-head latent attention, save its `q_proj`, which other layers have too."""
    names = {
        "q_a_proj": "q_down",
        "q_a_layernorm": "q_norm",
        "q_b_proj": "q_proj",
        "kv_a_layernorm": "kv_norm",
    }
    names |= {"kv_a_proj_with_mqa": "kv_down", "kv_b_proj": "kv_up", "o_proj": "o_proj"}
    return [Rule(f"{theirs}.{name}.*", f"{ours}.{own}.*") for name, own in names.items()]


def activation(name: str) -> str:
    """Our name of their activation."""
    return ACTIVATIONS.get(name, name)


def letters(kinds: Sequence[str], table: Mapping[str, str]) -> str:
    """The pattern of a list of layer types, each a key of the table.

    Raises:
        ValueError: a type that the table does not have.
    """
    unknown = sorted(set(kinds) - set(table))
    if unknown:
        raise ValueError(f"layers of type {unknown}, expected {sorted(table)}")
    return "".join(table[kind] for kind in kinds)


def rope(parameters: Mapping[str, object], *, head_dim: int | None = None, **more) -> Rope:
    """Rotary positions of their `rope_parameters`.

    Args:
        parameters: one mapping, of one type of layer.
        head_dim: K, where a part of it turns.
        more: further fields of `Rope`.

    Raises:
        ValueError: a stretching that `Rope` does not have.
    """
    kind, part = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        more["dims"] = int(head_dim * part)
    more["theta"] = parameters["rope_theta"]
    if kind == "default":
        return Rope(**more)
    more |= dict(scaling=kind, factor=parameters["factor"])
    if kind != "linear":
        more["context"] = parameters["original_max_position_embeddings"]
    if kind == "llama3":
        more |= dict(low=parameters["low_freq_factor"], high=parameters["high_freq_factor"])
    if kind == "yarn":
        more |= dict(
            low=parameters.get("beta_slow") or 1.0,
            high=parameters.get("beta_fast") or 32.0,
            truncate=parameters.get("truncate", True),
            gain=parameters.get("attention_factor"),
        )
    return Rope(**more)


def mamba2(theirs: str, ours: str, groups: int) -> list[Rule]:
    """A Mamba-2 block, whose convolution has an axis more there, and whose norm is one vector.

    Args:
        theirs, ours: names of the block.
        groups: of the norm.
    """
    return [
        Rule(f"{theirs}.conv1d.weight", f"{ours}.conv.weight", lambda x: x.squeeze(1)),
        Rule(f"{theirs}.conv1d.bias", f"{ours}.conv.bias"),
        Rule(f"{theirs}.norm.weight", f"{ours}.norm.weight", lambda x: x.view(groups, -1)),
        Rule(f"{theirs}.*", f"{ours}.*"),
    ]
