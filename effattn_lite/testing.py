"""Inputs, error budgets and small measures shared by tests, bench and notebooks.

Every test and every notebook draws its tensors here, from the axes of the registry's row, so that a
new method is tested without a new generator. NumPy alone at import; torch is imported where asked for.
"""

import importlib

import numpy as np

from effattn_lite.counting import count_flops
from effattn_lite.registry import find

__all__ = [
    "EPS",
    "HARD",
    "WIDE",
    "budget",
    "count_flops",
    "flat",
    "make_inputs",
    "max_error",
    "on_parts",
    "relative_error",
    "round_to",
    "run_op",
    "run_reference",
    "sizes_of",
    "to_numpy",
    "to_torch",
]

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Unit roundoff of each dtype: distance from 1 to the next number."""

TINY = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""Smallest positive number of each dtype."""

WIDE = ("g", "u", "dt", "A", "initial_state")
"""Tensors that stay float32 or wider, whatever the dtype of q, k and v."""

HARD = ("weak", "strong", "zero", "repeated")


def sizes_of(*, B=2, T=48, H=2, HV=None, HKV=None, K=16, V=24, D=20, M=12):
    """Sizes of all axes; HV and HKV follow H unless given."""
    return dict(B=B, T=T, H=H, HV=HV or H, HKV=HKV or H, K=K, V=V, D=D, M=M)


def make_inputs(name, *, seed=0, hard=None, state=False, dtype="float64", **sizes):
    """Random tensors for a method, as NumPy arrays, in the order of its registry row.

    Args:
        name: a method of the registry.
        seed: of `numpy.random.default_rng`.
        hard: None, or a stress: "weak" decay (nothing is forgotten), "strong" (g = -20 a token),
            "zero" (all keys 0), "repeated" (the same key at every token).
        state: add "initial_state", drawn normal; a state of several parts, or with an axis that no input has,
            is one that 8 other tokens leave.
        dtype: values are rounded to it ("bfloat16" too), then returned as float64 or, for float32
            and float16, as that dtype; a kernel and its float64 reference so see the same numbers.
        **sizes: any of B, T, H, HV, HKV, K, V, D, M.

    Raises:
        ValueError: unknown method or stress.
    """
    row, full = find(name), sizes_of(**sizes)
    if hard not in (None, *HARD):
        raise ValueError(f"hard is {hard!r}, expected one of {(None, *HARD)}")
    rng = np.random.default_rng(seed)
    axes = dict(row.inputs)
    # an axis that no input has, as a feature map's, is the method's own to size
    known = {a for spec in axes.values() for a in spec.split()}
    left = isinstance(row.state, tuple) or any(a not in known for part in row.states for a in part.split())
    if state and row.stateful and not left:
        axes["initial_state"] = row.state
    drawn = {t: _draw(rng, t, [full[a] for a in ax.split()], hard) for t, ax in axes.items()}
    for t in row.unit:
        drawn[t] = drawn[t] / np.maximum(np.linalg.norm(drawn[t], axis=-1, keepdims=True), 1e-12)
    if {"a", "b"} <= set(axes):  # b erases a share of what a finds, so that no state grows
        drawn["b"] = -drawn["a"] / (1 + np.exp(-drawn["b"]))
    drawn = {t: round_to(x, dtype) for t, x in drawn.items()}
    if state and left:
        # parts of a state belong together (a normaliser is no free number): it is what a short text leaves
        text = make_inputs(name, seed=seed + 1, **sizes | dict(T=8))
        parts = run_reference(name, text, **row.options[0])[1]
        wide = "float32" if dtype != "float64" else dtype
        drawn["initial_state"] = on_parts(lambda x: round_to(x, wide), parts)
    return drawn


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


RULES = {
    "beta": _sigmoid,
    "mu": _sigmoid,
    # step sizes of a state space model, log-uniform as they are first drawn
    "dt": lambda x: np.exp(np.log(1e-3) + np.log(300) * _sigmoid(2 * x)),
    "A": lambda x: -np.exp(x),
    # a rate of learning that does not overshoot keys of length 4 or 5
    "eta": lambda x: _sigmoid(x) / 16,
    "ln_weight": lambda x: 1 + x / 4,
    # a projection along the text: sums of tokens that are as long as a token
    "e": lambda x: x / max(x.shape[0], 1) ** 0.5,
    # weights of an inner model
    **dict.fromkeys(("w", "w1", "w2"), lambda x: x / x.shape[-2] ** 0.5),
    # recurrent weights: a loop that they close must not be chaotic
    **dict.fromkeys(("r_z", "r_i", "r_f", "r_o"), lambda x: x / x.shape[-1]),
}
"""What is made of normal numbers for tensors that must not be normal, by name."""


def _draw(rng, tensor, shape, hard):
    if tensor == "g":
        return _log_decay(rng, shape, hard)
    x = rng.normal(size=shape)
    if tensor in RULES:
        return RULES[tensor](x)
    # what reads a state before it is written to is a key too
    if tensor in ("k", "a") and hard == "zero":
        return np.zeros(shape)
    if tensor in ("k", "a") and hard == "repeated":
        return np.broadcast_to(x[:, :1], shape).copy()
    return x


def _log_decay(rng, shape, hard):
    if hard == "weak":
        return np.full(shape, -1e-6)
    if hard == "strong":
        return np.full(shape, -20.0)
    # log-uniform: half-lives from one token to a few hundred, as trained models have them
    return -np.exp(rng.uniform(np.log(2e-3), np.log(0.7), size=shape))


def round_to(x, dtype):
    """Round float64 values to a dtype's grid; bfloat16 comes back as float32, which holds it exactly."""
    if dtype == "bfloat16":
        bits = np.asarray(x, np.float32).view(np.uint32)
        # round to nearest, ties to even, on the upper 16 bits
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    return np.asarray(x, dtype)


def flat(x):
    """The parts of x in one tuple: a state may have several, and stand in a tuple itself."""
    return tuple(part for y in x for part in flat(y)) if isinstance(x, tuple) else (x,)


def on_parts(function, *x):
    """A function of every part of x, in a tuple where x is one; several x go part by part."""
    if isinstance(x[0], tuple):
        return tuple(on_parts(function, *parts) for parts in zip(*x, strict=True))
    return function(*x)


def to_torch(inputs, *, dtype="float64", device="cpu", requires_grad=False):
    """The same inputs as torch tensors; states and log decays stay float32 or wider."""
    import torch

    wide = torch.float64 if dtype == "float64" else torch.float32

    def convert(name, x):
        kind = wide if name in WIDE else getattr(torch, dtype)
        return torch.tensor(np.asarray(x), dtype=kind, device=device).requires_grad_(requires_grad)

    return {name: on_parts(lambda part, name=name: convert(name, part), x) for name, x in inputs.items()}


def max_error(a, b):
    """Largest absolute difference of two arrays, tensors or tuples of them; NaN counts as infinite."""
    if isinstance(a, tuple):
        return max(max_error(x, y) for x, y in zip(flat(a), flat(b), strict=True))
    a, b = to_numpy(a), to_numpy(b)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if a.size == 0:
        return 0.0
    both = np.isinf(a) & (a == b)  # -inf in an lse is a right answer
    diff = np.abs(np.where(both, 0, a) - np.where(both, 0, b))
    return float(np.where(np.isnan(diff), np.inf, diff).max())


def to_numpy(x):
    """Any array or tensor as a float64 NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().to("cpu").double().numpy()
    return np.asarray(x, np.float64)


def budget(reference, plain, dtype, *, factor=2.0, magnitude=0.0, terms=0):
    r"""Largest error that a kernel may have.

    .. math:: f\,\bigl(\mathrm{err}(plain) + (\epsilon + \sqrt{n}\,\epsilon_{32})\,m + \eta\bigr)

    plain torch sums in an order of its own, often pairwise; whoever sums n terms one after the other in
    float32 rounds n times, and random roundings add up as their root (Higham and Mary 2019).

    Args:
        reference: the answer in float64.
        plain: the same computed by plain torch in the kernel's dtype.
        dtype: the kernel's input dtype.
        factor: 2 for outputs, 3 for gradients (flash-attention's and attention-gym's rule).
        magnitude: m, if larger than the answer itself: size of numbers that cancel on the way to it.
        terms: n, the longest product that a kernel adds up term by term, as K of q k.

    eta is the smallest number of the dtype: an operand of a product may underflow.
    """
    ref = to_numpy(reference)
    top = max(np.abs(ref[np.isfinite(ref)]).max(initial=0.0), magnitude)
    eps = EPS[dtype] + (terms**0.5 * EPS["float32"] if dtype != "float64" else 0.0)
    return factor * (max_error(reference, plain) + eps * float(top) + TINY[dtype])


def relative_error(a, b):
    """`max_error` over the largest finite value of b; where b is all zero, `max_error` itself."""
    parts = [to_numpy(x) for x in flat(b)]
    top = max(np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in parts)
    return max_error(a, b) / (float(top) or 1.0)


def run_reference(name, inputs, *, form=None, **options):
    """One form of a method's reference on float64 inputs; the row's first form unless given.

    Returns:
        (o, state) for a method with a state, (o, lse) for softmax and sparse ones.
    """
    row = find(name)
    module = importlib.import_module(f"effattn_lite.reference.{row.name}")

    wide = {t: on_parts(lambda part: np.asarray(part, np.float64), x) for t, x in inputs.items()}
    return getattr(module, form or row.forms[0])(**wide, **options)


def run_op(name, inputs, **options):
    """A method's op on torch tensors, asked for all it can return: (o, state) or (o, lse)."""
    row = find(name)
    op = getattr(importlib.import_module(f"effattn_lite.ops.{row.name}"), row.name)
    everything = "output_final_state" if row.stateful else "return_lse"
    return op(**inputs, **options, **{everything: True})
