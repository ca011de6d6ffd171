"""FLOPs of a NumPy function, counted by arrays that watch what is done with them."""

from contextlib import contextmanager

import numpy as np

__all__ = ["count_flops"]


def count_flops(form, inputs, **options):
    """FLOPs of one run of a reference form, counted by arrays that watch what is done with them.

    Args:
        form: a function of `effattn_lite.reference`, or any other that uses NumPy.
        inputs: tensor name -> array, as `make_inputs` returns them.
        **options: further keyword arguments of the form.

    Returns:
        The count, int, by these rules.

        - Counted is what touches data: the inputs with a value a token (first axes those of q, [B, T]),
          states, what the form allocates with zeros, empty or full, and all that is computed from these.
          Parameters (g of shape [H], say), the scale, masks, positions and integers are no data; but an
          operation that mixes them with data counts.
        - einsum: n operands over an index space of P points count n P where an index is summed (2 a
          multiply-add), (n - 1) P where none is (an outer product: 1 an element).
        - matmul and dot: 2 a multiply-add. linalg.solve: n^3 2 // 3 + 2 n^2 m; linalg.inv: 2 n^3.
        - Every other arithmetic ufunc, from add to exp: 1 an element of its result; sums, maxima, cumsums:
          1 an element of their argument. A complex number is one element.
        - Free: comparisons, logic, where, indexing, copies, reshaping, sorting.
    """
    Counted = _counted_class()
    tokens = np.shape(next(iter(inputs.values())))[:2]

    def watch(name, x):
        if isinstance(x, tuple):
            return tuple(watch(name, part) for part in x)
        data = name in ("state", "initial_state") or np.shape(x)[:2] == tokens
        return np.array(x, np.float64).view(Counted) if data and np.ndim(x) > 1 else x

    with _allocating(Counted):
        form(**{name: watch(name, x) for name, x in inputs.items()}, **options)
    return Counted.flops


FREE = {np.positive, np.isnan, np.isinf, np.isfinite, np.signbit}
FREE |= {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
FREE |= {np.logical_and, np.logical_or, np.logical_not, np.logical_xor}
REFUSED = {np.tensordot, np.inner, np.outer, np.vdot, np.kron, np.convolve, np.correlate}


def _counted_class():
    """A fresh ndarray subclass with a counter of its own, so that runs do not add up."""

    class Counted(np.ndarray):
        flops = 0

        def __array_ufunc__(self, ufunc, method, *args, out=None, **kwargs):
            if out is not None:
                kwargs["out"] = tuple(_plain(x, Counted) for x in out)
            result = getattr(ufunc, method)(*_plain(args, Counted), **kwargs)
            Counted.flops += _ufunc_flops(ufunc, method, args, result)
            return out[0] if out is not None else _watched(result, Counted)

        def __array_function__(self, function, types, args, kwargs):
            if function in REFUSED:
                raise NotImplementedError(
                    f"count_flops has no rule for np.{function.__name__}: write an einsum"
                )
            if function not in RULES:  # written in ufuncs itself, or free
                return _watched(super().__array_function__(function, types, args, kwargs), Counted)
            args, kwargs = _plain(args, Counted), {k: _plain(x, Counted) for k, x in kwargs.items()}
            Counted.flops += RULES[function](*args)
            return _watched(function(*args, **kwargs), Counted)

        def __getitem__(self, index):
            # a scalar stays watched
            return _watched(super().__getitem__(index), Counted)

    return Counted


def _plain(x, Counted):
    if isinstance(x, (tuple, list)):
        return type(x)(_plain(y, Counted) for y in x)
    return x.view(np.ndarray) if isinstance(x, Counted) else x


def _watched(x, Counted):
    if isinstance(x, (tuple, list)):
        return type(x)(_watched(y, Counted) for y in x)
    is_data = isinstance(x, (np.ndarray, np.inexact)) and np.asarray(x).dtype.kind in "fc"
    return np.asanyarray(x).view(Counted) if is_data else x


def _ufunc_flops(ufunc, method, args, result):
    if ufunc is np.matmul:
        return 2 * np.size(result) * np.shape(args[0])[-1]
    if ufunc in FREE or method == "at" or np.asarray(result).dtype.kind not in "fc":
        return 0
    return np.size(args[0]) if method in ("reduce", "accumulate", "reduceat") else np.size(result)


def _einsum_flops(subscripts, *operands):
    terms, _, out = subscripts.replace(" ", "").partition("->")
    size, points = {}, 1
    for term, x in zip(terms.split(","), operands, strict=True):
        head, dots, tail = term.partition("...")
        # axes under an ellipsis are named from the right: they broadcast
        wild = [f"...{i}" for i in range(np.ndim(x) - len(head + tail), 0, -1)] if dots else []
        for axis, n in zip([*head, *wild, *tail], np.shape(x), strict=True):
            size[axis] = n if size.get(axis, 1) == 1 else size[axis]
    for n in size.values():
        points *= n
    summed = any(axis not in out for axis in size if len(axis) == 1)
    return (len(operands) - (not summed)) * points


def _solve_flops(A, B):
    n, batch = A.shape[-1], A.size // A.shape[-1] ** 2
    return batch * (2 * n**3 // 3) + 2 * n * B.size


RULES = {
    np.einsum: _einsum_flops,
    np.dot: lambda a, b: 2 * a.size * (b.size // a.shape[-1]),
    np.linalg.solve: _solve_flops,
    np.linalg.inv: lambda A: 2 * A.size * A.shape[-1],
}


@contextmanager
def _allocating(Counted):
    """Inside, np.zeros, np.empty and np.full give watched arrays, and np.asarray keeps them watched."""
    kept = {name: getattr(np, name) for name in ("zeros", "empty", "full", "asarray")}

    def watching(make):
        return lambda *args, **kwargs: _watched(make(*args, **kwargs), Counted)

    try:
        for name in ("zeros", "empty", "full"):
            setattr(np, name, watching(kept[name]))
        np.asarray = np.asanyarray
        yield
    finally:
        for name, make in kept.items():
            setattr(np, name, make)
