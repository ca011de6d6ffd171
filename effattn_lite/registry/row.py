"""The two kinds of rows of the registry: a method and a chapter. Strings and shapes only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ROOMS = ("reference", "op", "kernel", "layer", "model")
FAMILIES = (
    "softmax attention",
    "feature map",
    "fixed decay",
    "state space",
    "gated decay",
    "delta rule",
    "online learning",
    "element-wise",
    "memory slots",
    "low rank",
    "fixed pattern",
    "selected blocks",
    "clustering",
    "uniform model",
    "sparse hybrid",
    "linear hybrid",
    "advanced hybrid",
)
EMPTY = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """One method of the survey: its name, and what every other room may ask about it.

    Attributes:
        name: the one name, snake_case; file name in every room.
        title: how the authors write it.
        family: one of FAMILIES; a colour in every figure.
        survey: section of arXiv:2507.19595 that covers it, or "beyond".
        chapter: path under book/ of the chapter that derives it.
        cite: keys of book/references.bib, the paper first.
        rooms: what the project promises for it, a subset of ROOMS.
        inputs: tensor name -> axes by `notation.AXES`, separated by blanks; all are passed by keyword.
        unit: tensors whose last axis has length 1 in real use, as keys of a delta rule; tests draw them so.
        state: axes of the carried state, a tuple of them where it has several parts, or None.
        forms: functions of the reference that compute the same output; the first is the plainest.
        options: static keyword arguments the laws run with, one run a mapping.
        engine: file in ops/engines/ and kernels/ that computes it.
        layer: class in layers/<name>.py.
        reduces_to: other method -> the setting in which this one gives exactly the other.
        aliases: other names, for search only.
        causal: output t depends on tokens up to t only (for every entry of options that keeps it so).
        differentiable: a backward is owed.
    """

    name: str
    title: str
    family: str
    survey: str
    chapter: str
    cite: tuple[str, ...] = ()
    rooms: tuple[str, ...] = ("reference", "op", "kernel", "layer")
    inputs: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    unit: tuple[str, ...] = ()
    state: str | tuple[str, ...] | None = None
    forms: tuple[str, ...] = ()
    options: tuple[Mapping[str, object], ...] = (EMPTY,)
    engine: str | None = None
    layer: str | None = None
    reduces_to: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    aliases: tuple[str, ...] = ()
    causal: bool = True
    differentiable: bool = True

    @property
    def states(self) -> tuple[str, ...]:
        """Axes of every part of the carried state; none if nothing is carried."""
        return (self.state,) if isinstance(self.state, str) else self.state or ()

    @property
    def stateful(self) -> bool:
        """Whether the op carries a state from one call to the next."""
        return self.state is not None


@dataclass(frozen=True)
class Chapter:
    """One chapter: what its header box says beyond its methods' rows.

    Attributes:
        path: file under book/, without suffix.
        title: heading of the page.
        survey: sections of the survey it covers, or "".
        needs: chapters to read first, as paths.
        device: what its cells need.
    """

    path: str
    title: str
    survey: str = ""
    needs: tuple[str, ...] = ()
    device: str = "any CPU"
