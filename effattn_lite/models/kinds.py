"""The kinds of parts by name: where the class of each is, and what its cache holds. Imports no torch."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from effattn_lite.models.config import Part


@dataclass(frozen=True)
class Held:
    """What one row's cache of one part holds.

    Attributes:
        plain: numbers in the model's dtype: keys, values, tails of convolutions.
        wide: numbers of states, at least float32.
        counters: integers of 8 bytes.
    """

    plain: int = 0
    wide: int = 0
    counters: int = 0

    def __add__(self, other: "Held") -> "Held":
        return Held(self.plain + other.plain, self.wide + other.wide, self.counters + other.counters)

    def bytes(self, itemsize: int) -> int:
        """Bytes, where a number of the model has `itemsize`."""
        return self.plain * itemsize + self.wide * max(itemsize, 4) + 8 * self.counters


def nothing(width: int, length: int, **options) -> Held:
    """A part without a cache."""
    return Held()


def attention(
    width: int,
    length: int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    window: int | None = None,
    first: int = 0,
    chunk: int | None = None,
    borrows: str | None = None,
    **_,
) -> Held:
    """Keys and values of the tokens that the next one sees, and a count."""
    if borrows:
        return Held()
    K, seen = head_dim or width // heads, length
    if window:
        seen = min(length, first + window - 1)
    elif chunk:
        seen = length % chunk
    return Held(plain=seen * (kv_heads or heads) * (K + (value_dim or K)), counters=1)


def mamba(width: int, length: int, *, expand: int = 2, states: int = 16, conv_size: int = 4, **_) -> Held:
    """A state a channel and the tail of the convolution."""
    inner = expand * width
    return Held(wide=inner * states, plain=inner * (conv_size - 1))


def mamba2(
    width: int,
    length: int,
    *,
    heads: int,
    state: int = 128,
    groups: int = 1,
    expand: int = 2,
    taps: int = 4,
    head_dim: int | None = None,
    **_,
) -> Held:
    """A state a head and the tail of the convolution over x, B and C."""
    inner = heads * head_dim if head_dim else expand * width
    return Held(wide=inner * state, plain=(taps - 1) * (inner + 2 * groups * state))


def delta(
    width: int,
    length: int,
    *,
    heads: int,
    head_dim: int | None = None,
    value_heads: int | None = None,
    expand_v: int = 1,
    conv_size: int = 4,
    **_,
) -> Held:
    """A state a value head and the tails of the convolutions over q, k and v."""
    K, HV = head_dim or width // heads, value_heads or heads
    V = expand_v * K
    return Held(wide=HV * K * V, plain=(conv_size - 1) * (2 * heads * K + HV * V))


def side_by_side(width: int, length: int, *, parts: Mapping[str, Part]) -> Held:
    """What all of its parts keep."""
    return sum((held(width, part, length) for part in parts.values()), Held())


def rg_lru(width: int, length: int, *, inner: int, taps: int = 4, **_) -> Held:
    """A number a channel and the tail of the convolution."""
    return Held(wide=inner, plain=inner * (taps - 1))


def shared_attention(
    width: int, length: int, *, mamba: dict, heads: int, kv_heads: int | None = None, **_
) -> Held:
    """What attention over twice the width keeps, and what Mamba-2 does."""
    return attention(2 * width, length, heads=heads, kv_heads=kv_heads) + mamba2(width, length, **mamba)


def lightning(width: int, length: int, *, heads: int, head_dim: int | None = None, **_) -> Held:
    """A state a head."""
    return Held(wide=heads * (head_dim or width // heads) ** 2)


def gated_delta(
    width: int, length: int, *, heads: int, head_dim: int | None = None, expand_v: int = 2, **options
) -> Held:
    """As `delta`, with this layer's own sizes."""
    K = head_dim or 3 * width // (4 * heads)
    return delta(width, length, heads=heads, head_dim=K, expand_v=expand_v, **options)


def latent(width: int, length: int, *, rank: int, rope_dim: int, index_heads=0, index_dim=128, **_) -> Held:
    """A latent vector, a short key and an indexer's key a token, and a count."""
    return Held(plain=length * (rank + rope_dim + (index_dim if index_heads else 0)), counters=1)


def gated_retention(width: int, length: int, *, heads: int, **_) -> Held:
    """A state a head and a count."""
    return Held(wide=width * (width // heads), counters=1)


def keys_values(width: int, length: int, *, kv_heads: int, head_dim: int, **_) -> Held:
    """Keys and values of all tokens, and a count."""
    return Held(plain=2 * length * kv_heads * head_dim, counters=1)


def parallel_heads(width: int, length: int, *, attention: Mapping, mamba: Mapping, **_) -> Held:
    """What both mixers keep."""
    return KINDS["attention"].held(width, length, **attention) + KINDS["mamba"].held(width, length, **mamba)


def rwkv4(width: int, length: int, **_) -> Held:
    """Three sums a channel, and the last token."""
    return Held(wide=3 * width, plain=width)


def rwkv(width: int, length: int, *, heads: int, **_) -> Held:
    """A state a head, and the last token."""
    return Held(wide=width * (width // heads), plain=width)


def channel_mixing(width: int, length: int, **_) -> Held:
    """The last token."""
    return Held(plain=width)


@dataclass(frozen=True)
class Kind:
    """Where a kind's class is, "module:class", and the formula of its cache.

    The formula takes width, length and the part's options by keyword, and returns what one row holds.
    """

    path: str
    held: Callable[..., Held] = nothing

    def load(self) -> type:
        """The class; imports torch."""
        module, name = self.path.split(":")
        return getattr(importlib.import_module(f"effattn_lite.{module}"), name)


KINDS = {
    "attention": Kind("models.attention:Attention", attention),
    "lightning": Kind("models.lightning:Lightning", lightning),
    "mamba": Kind("layers.mamba:Mamba", mamba),
    "mamba2": Kind("layers.mamba2:Mamba2", mamba2),
    "side_by_side": Kind("models.side_by_side:SideBySide", side_by_side),
    "rg_lru": Kind("models.rg_lru:RGLRU", rg_lru),
    "shared_attention": Kind("models.shared_attention:SharedAttention", shared_attention),
    "gated_delta": Kind("layers.gated_deltanet:GatedDeltaNet", gated_delta),
    "kda": Kind("layers.kda:KDA", delta),
    "latent_attention": Kind("models.latent_attention:LatentAttention", latent),
    "gated_retention": Kind("models.gated_retention:GatedRetention", gated_retention),
    "keys_values": Kind("models.memory:KeysValues", keys_values),
    "differential_attention": Kind("models.differential_attention:DifferentialAttention", attention),
    "lending_mamba": Kind("models.memory:LendingMamba", mamba),
    "gated_memory": Kind("models.memory:GatedMemory"),
    "parallel_heads": Kind("models.parallel_heads:ParallelHeads", parallel_heads),
    "rwkv4": Kind("models.rwkv:TimeMixing4", rwkv4),
    "rwkv5": Kind("models.rwkv:TimeMixing5", rwkv),
    "rwkv6": Kind("models.rwkv:TimeMixing6", rwkv),
    "rwkv7": Kind("models.rwkv:TimeMixing7", rwkv),
    "channel_mixing": Kind("models.rwkv:ChannelMixing", channel_mixing),
    "block_attention": Kind("models.block_attention:BlockAttention", attention),
    "gated": Kind("models.feed_forward:Gated"),
    "plain": Kind("models.feed_forward:Plain"),
    "experts": Kind("models.feed_forward:Experts"),
}
"""Every kind by its name in a configuration; the class takes the width and the part's options."""


def kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"no kind is called {name!r}, expected one of {sorted(KINDS)}")
    return KINDS[name]


def held(width: int, part: Part, length: int) -> Held:
    """What one row's cache of a part holds after `length` tokens."""
    return kind(part.kind).held(width, length, **part.options)


def build_part(width: int, part: Part, *, place: tuple[int, int] = (0, 1)):
    """The module of a part.

    Args:
        width: D.
        part: its kind and options.
        place: number of its layer, and of all layers; a class with `placed = True` takes it as well, where
            the layer's depth is in a formula.

    Raises:
        TypeError: an option that the kind does not take, with the kind's name.
    """
    owner = kind(part.kind).load()
    more = {"place": place} if getattr(owner, "placed", False) else {}
    try:
        return owner(width, **part.options, **more)
    except TypeError as error:
        raise TypeError(f"a part of kind {part.kind!r}: {error}") from error
