"""The runs of the laws: every registered name whose room exists, with its options, over few telling sizes."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from effattn_lite import registry, testing

SIZES = (
    dict(B=2, T=63, H=3, K=16, V=24),  # T not a multiple of any chunk, K != V
    dict(B=1, T=1, H=2, K=8, V=8),
    dict(B=2, T=5, H=2, K=8, V=4),  # T < C
    dict(B=1, T=37, H=4, HKV=2, HV=8, K=8, V=12),  # grouped heads
)
SHORT = {"float16": "fp16", "float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Case:
    """One run of a law: a method, its static options, sizes, a stress and a dtype."""

    name: str
    options: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    hard: str | None = None
    dtype: str = "float64"

    @property
    def row(self):
        return registry.find(self.name)

    def __str__(self):
        words = [self.name, *(f"{k}{v}" for k, v in (*self.sizes.items(), *self.options.items()))]
        return "-".join([*words, *([self.hard] if self.hard else []), SHORT[self.dtype]])

    def inputs(self, *, state=True, **more):
        """The case's tensors, read-only, with an initial state where the method has one."""
        made = testing.make_inputs(
            self.name, hard=self.hard, state=state, dtype=self.dtype, **self.sizes | more
        )
        for x in testing.flat(tuple(made.values())):
            x.setflags(write=False)
        return made

    def tensors(self, *, state=True, device="cpu", requires_grad=False, **more):
        """The same as torch tensors."""
        made = {name: testing.on_parts(np.array, x) for name, x in self.inputs(state=state, **more).items()}
        return testing.to_torch(made, dtype=self.dtype, device=device, requires_grad=requires_grad)


def cases(room, where=None, *, sizes=SIZES[:1], hard=(None,), dtypes=("float64",)):
    """Parameters for `pytest.mark.parametrize`: all combinations that mean something.

    Args:
        room: whose file must exist.
        where: keeps a case if it returns True; all unless given.
        sizes, hard, dtypes: combined; sizes with grouped heads only where the method groups heads.
    """
    found = []
    for name in registry.names(room):
        row = registry.find(name)
        axes = {a for spec in row.inputs.values() for a in spec.split()}
        for options in row.options:
            for size in sizes:
                grouped = {a for a in ("HKV", "HV") if a in size}
                if grouped and not grouped & axes:
                    continue
                size = {a: n for a, n in size.items() if a not in grouped - axes}
                found += [Case(name, options, size, h, dtype) for h in hard for dtype in dtypes]
    return [pytest.param(case, id=str(case)) for case in found if where is None or where(case)]


def stateful(case):
    return case.row.stateful


def causal(case):
    return case.row.causal and case.options.get("causal", True)


def stressed(case):
    """Whether the case's stress reaches it: weak and strong are of a decay, zero and repeated of keys."""
    return ("g" if case.hard in ("weak", "strong") else "k") in case.row.inputs


def differentiable(case):
    return case.row.differentiable


def tokens(case, inputs, part):
    """The inputs restricted to a slice of tokens; what has none, or a row a position, stays whole."""
    axes = case.row.inputs
    return {name: x[:, part] if axes.get(name, "").startswith("B T") else x for name, x in inputs.items()}


def changed(case, inputs, t):
    """The inputs with every tensor's token t replaced by another."""
    other, made = case.inputs(seed=1), dict(inputs)
    for name, axes in case.row.inputs.items():
        if "T" in axes.split():
            made[name] = inputs[name].copy()
            made[name][:, t] = other[name][:, t]
    return made


def row_of(case, inputs, b):
    """The inputs of batch row b alone, as a batch of one."""

    def alone(name, x):
        batched = case.row.inputs.get(name, "B").startswith("B")
        return testing.on_parts(lambda part: part[b : b + 1] if batched else part, x)

    return {name: alone(name, x) for name, x in inputs.items()}


def repeated(case, name):
    """Of a tensor, its first batch row twice; a tensor that all rows share stays as it is."""
    batched = case.row.inputs.get(name, "B").startswith("B")
    return lambda x: x[:1].expand(2, *x.shape[1:]) if batched else x
