"""What a language model is made of, as data: a pattern of letters, and what each letter stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

PLACEMENTS = ("pre", "pre_post", "post", "parallel", "post_residual")
EMPTY = MappingProxyType({})


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis.

    Attributes:
        kind: "rms", "layer" (subtracts the mean) or "none".
        eps: added to the mean square.
        offset: 1 where the weight is stored as its difference from 1.
        weight: multiply by a learned weight.
        bias: add a learned bias.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    weight: bool = True
    bias: bool = False

    def __post_init__(self):
        _one_of("norm.kind", self.kind, ("rms", "layer", "none"))


@dataclass(frozen=True)
class Rope:
    """Rotary positions: which channels turn, and how fast.

    Attributes:
        theta: base of the wavelengths.
        dims: channels of a head that turn, the first ones; None turns all.
        adjacent: pairs are (2 i, 2 i + 1), as GPT-J lays them out, instead of (i, i + dims / 2).
        scaling: "linear", "llama3" or "yarn" stretches the wavelengths, None does not.
        factor: by which they are stretched.
        context: tokens that the model was first trained with ("llama3", "yarn").
        low, high: turns in `context` below which a wavelength is stretched, above which it is not; between
            them the two are mixed. YaRN's paper writes beta_slow, beta_fast.
        truncate: round the borders of the mixed channels outwards ("yarn").
        gain: factor on the rotated vectors ("yarn"); None is 0.1 ln(factor) + 1.
    """

    theta: float = 10_000.0
    dims: int | None = None
    adjacent: bool = False
    scaling: str | None = None
    factor: float = 1.0
    context: int | None = None
    low: float = 1.0
    high: float = 32.0
    truncate: bool = True
    gain: float | None = None

    def __post_init__(self):
        _one_of("rope.scaling", self.scaling, (None, "linear", "llama3", "yarn"))
        if self.scaling in ("llama3", "yarn") and not self.context:
            raise ValueError(f"rope.context is {self.context}, expected tokens: {self.scaling} needs it")


@dataclass(frozen=True, init=False)
class Part:
    """A mixer or a feed-forward: its kind, a key of `models.kinds.KINDS`, and what its constructor takes.

    Attributes:
        kind: what it is.
        options: keyword arguments after the width.
        carry, gain: the residual stream becomes carry * x + gain * y.
    """

    kind: str
    carry: float
    gain: float
    options: Mapping[str, object]

    def __init__(self, kind: str, *, carry: float = 1.0, gain: float = 1.0, **options):
        for name, value in dict(kind=kind, carry=carry, gain=gain, options=MappingProxyType(options)).items():
            object.__setattr__(self, name, value)

    def __repr__(self):
        scales = {name: x for name in ("carry", "gain") if (x := getattr(self, name)) != 1}
        rest = "".join(f", {name}={value!r}" for name, value in (scales | dict(self.options)).items())
        return f"Part({self.kind!r}{rest})"


@dataclass(frozen=True)
class Layer:
    """One layer of the expanded pattern; a part that is None is left out, with its norm.

    Attributes:
        index: its place, from 0.
        letter: of the pattern.
        mixer: what mixes tokens.
        feed: what works on each token.
    """

    index: int
    letter: str
    mixer: Part | None
    feed: Part | None


@dataclass(frozen=True)
class Config:
    """A decoder language model: a table of sizes and a pattern. Plain data, checked when it is made.

    Attributes:
        name: of the architecture, a row of the registry.
        vocab: tokens.
        width: D.
        pattern: one letter a layer, repeated until there are `depth` layers.
        mixers: letter of the pattern -> its mixer, or None.
        feeds: one letter a layer, repeated as well.
        feed_forwards: letter of `feeds` -> its feed-forward, or None.
        depth: L; default the length of the pattern.
        norm: of every norm outside the parts.
        placement: where the norms of a layer stand, one of PLACEMENTS; `models.block` has the formulas.
        tie: the head's weight is the embedding's.
        positions: learned positions, that many; 0 adds none.
        embedding_scale: factor on the embedding.
        embedding_norm: normalise the embedding.
        logit_scale: factor on the logits.
        logit_softcap: c > 0, logits become c tanh(logit / c).
        meta: learned tokens in front of every text; they have positions and places in caches, but no logits.
        same: path of a module -> path of the one that it is: two layers that share weights.
    """

    name: str
    vocab: int
    width: int
    pattern: str
    mixers: Mapping[str, Part | None]
    feed_forwards: Mapping[str, Part | None]
    feeds: str = "F"
    depth: int | None = None
    norm: Norm = field(default_factory=Norm)
    placement: str = "pre"
    tie: bool = False
    positions: int = 0
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    meta: int = 0
    same: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    def __post_init__(self):
        _one_of("placement", self.placement, PLACEMENTS)
        for letters, table in (("pattern", "mixers"), ("feeds", "feed_forwards")):
            unknown = sorted(set(getattr(self, letters)) - set(getattr(self, table)))
            if unknown or not getattr(self, letters):
                raise ValueError(
                    f"{letters} is {getattr(self, letters)!r} with unknown letters {unknown}, "
                    f"expected letters of {table}: {sorted(getattr(self, table))}"
                )
        for name in ("vocab", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected >= 1")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected None or >= 1")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The expanded pattern, one record a layer."""
        depth = self.depth or len(self.pattern)
        letters = [
            (self.pattern[i % len(self.pattern)], self.feeds[i % len(self.feeds)]) for i in range(depth)
        ]
        return tuple(
            Layer(i, mixer, self.mixers[mixer], self.feed_forwards[feed])
            for i, (mixer, feed) in enumerate(letters)
        )

    @property
    def late(self) -> int:
        """First layer from which on no layer keeps anything of its own, L if there is none.

        A prefill runs these layers for the last token alone: YOCO's early exit.
        """
        from effattn_lite.models.kinds import Held, held

        layers = self.layers
        keeps = [
            layer.index
            for layer in layers
            if any(held(self.width, part, 1) != Held() for part in (layer.mixer, layer.feed) if part)
        ]
        return max(keeps, default=-1) + 1

    def cache_bytes(self, length: int, *, batch: int = 1, itemsize: int = 4) -> int:
        """What decoding keeps after `length` tokens: keys and values, states, tails, a counter a layer.

        Args:
            length: tokens so far.
            batch: rows.
            itemsize: bytes of a number of the model; states are at least float32.
        """
        from effattn_lite.models.kinds import held

        parts = [part for layer in self.layers for part in (layer.mixer, layer.feed) if part]
        # 8 bytes: the model's own count of tokens
        return batch * (8 + sum(held(self.width, part, length + self.meta).bytes(itemsize) for part in parts))


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")
