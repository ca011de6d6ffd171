"""Checkers of the exercises in book/foundations/first_triton_kernel.md. NumPy alone at import."""

import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: the launch of a product of 100 x 72 and 72 x 150 in tiles of 32 x 64 x 32, float16.

    Args:
        answer: (programs, share of masked lanes, steps, bytes loaded, first row past int32) as numbers.
    """
    expected = (12, 1 - 15000 / 24576, 3, 129600, 32768)
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted(
            "put five numbers in the place of the dots: programs, share, steps, bytes, row."
        ) from None
    if len(got) != 5:
        raise Wrong(f"give five numbers, (programs, share, steps, bytes, row); you gave {len(got)}")
    names = ("programs", "share of masked lanes", "steps", "bytes loaded", "row")
    hints = (
        "ceil(100 / 32) rows of tiles times ceil(150 / 64) columns of tiles",
        "the programs have 12 * 32 * 64 lanes for the 100 * 150 entries of C; give a share, not per cent",
        "the depth of 72 is walked in steps of 32, the last one ragged",
        "A is read once for each column of tiles, B once for each row of tiles, two bytes a number",
        "row r starts at r * 65536, and int32 ends at 2^31 - 1; rows are counted from 0",
    )
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if not math.isclose(x, y, rel_tol=5e-3):
            raise Wrong(f"{name}: you gave {x:.6g}; {hint}")
    return "all five are right: 12 programs idle 39 % of their lanes, and 2^31 comes sooner than one thinks."


def exercise_3(program):
    """Code: a program that normalises one row to mean 0 and variance 1 under a mask.

    Args:
        program: function (memory, pid, x, o, C, BLOCK) in the style of the chapter's NumPy programs.
    """
    rng = np.random.default_rng(3)
    untouched = True
    for R, C, BLOCK in ((3, 16, 16), (4, 10, 16), (2, 5, 8), (5, 33, 64), (3, 1, 4)):
        what = f"{R} rows of {C} numbers with BLOCK={BLOCK}"
        x = (5 + 2 * rng.normal(size=(R, C))).astype(np.float32)
        memory = _Memory(x)
        for pid in rng.permutation(R):
            program(memory, (int(pid),), 0, memory.out, C, BLOCK)
        if memory.wild:
            raise Wrong(f"{what}: {memory.wild}. Give load and store the mask of the lanes below C.")
        got = memory.cells[memory.out : memory.out + R * C].reshape(R, C)
        untouched &= bool(np.isnan(got).all())
        if untouched:
            raise NotStarted("your program stores nothing yet: memory.store(o + ..., value, mask).")
        if np.isnan(got).any():
            raise Wrong(f"{what}: some entries of the output are not written, or written as NaN")
        wide = x.astype(np.float64)
        want = _normalised(wide, wide.mean(1, keepdims=True), C)
        if not np.allclose(got, want, rtol=1e-3, atol=1e-3):
            if np.allclose(got, _normalised(wide, wide.sum(1, keepdims=True) / BLOCK, BLOCK), rtol=1e-3):
                raise Wrong(f"{what}: a sum is divided by BLOCK; there are only C = {C} numbers in a row")
            if np.allclose(got, _masked_variance(wide, BLOCK), rtol=1e-3, atol=1e-3):
                raise Wrong(
                    f"{what}: the variance is too large. A masked lane is loaded as 0, but minus the mean it "
                    "is no longer 0: what must stand there before you square and sum?"
                )
        hint = "Both sums run over the C numbers of the row alone; add 1e-5 to the variance under the root."
        must_be_close(got, want, what, hint=hint, rtol=1e-4, atol=1e-5, what="your program")
    return "five shapes agree, ragged rows and rows of one number included, and no lane strayed."


def exercise_4(kernel):
    """Kernel puzzle: softmax of scaled scores over the keys up to the row's own, for any strides.

    Args:
        kernel: @triton.jit function (x, o, C, s_xr, s_xc, s_or, s_oc, scale, BLOCK: tl.constexpr), one
            program a row; row r sees columns 0 to r.
    """
    torch, device = _torch_and_device(kernel)
    gen = torch.Generator().manual_seed(4)
    layouts = {"contiguous rows": lambda x: x, "a transposed view": lambda x: x.t().contiguous().t()}
    for R, C, BLOCK, scale in ((16, 16, 16, 1.0), (10, 10, 16, 0.5), (5, 23, 32, 3.0), (9, 7, 8, -1.0)):
        for layout, arrange in layouts.items():
            what = f"{R} x {C} scores, BLOCK={BLOCK}, scale={scale}, {layout}"
            x = arrange(4 * torch.randn(R, C, generator=gen)).to(device)
            room = torch.full((R, C + 5), 12345.0, device=device)  # five columns that are not yours
            o = room[:, :C]
            kernel[(R,)](x, o, C, *x.stride(), *o.stride(), scale, BLOCK=BLOCK)
            if (room == 12345.0).all():
                raise NotStarted("your kernel stores nothing yet: row r of the result goes to o + r * s_or.")
            if not bool((room[:, C:] == 12345.0).all()):
                raise Wrong(f"{what}: the store wrote beyond column {C - 1}; mask it by the columns below C")
            see = torch.arange(C)[None, :] <= torch.arange(R)[:, None]
            want = (scale * x.double().cpu()).masked_fill(~see, -torch.inf).softmax(1)
            must_be_close(
                o, want, what, hint=_row_hint(o, want, see), rtol=1e-5, atol=1e-6, what="your kernel"
            )
    return "four shapes agree in two layouts each: rows shorter and longer than their row number, both signs."


def exercise_5(kernel):
    """Kernel puzzle: linear attention over chunks that starts from a given state and returns the last one.

    Args:
        kernel: @triton.jit function (q, k, v, o, S_in, S_out, T, K, V, C), the last three constexpr; one
            program, one head: q, k [T, K], v, o [T, V] and the states [K, V], contiguous float32.
    """
    torch, device = _torch_and_device(kernel)
    gen = torch.Generator().manual_seed(5)
    for T, K, V, C, fresh in ((16, 16, 16, 16, True), (48, 16, 32, 16, True), (40, 32, 16, 16, False)):
        start = "from S = 0" if fresh else "from a state that is not 0"
        what = f"T={T}, K={K}, V={V}, chunks of {C}, {start}"
        q, k, v, S = (torch.randn(*n, generator=gen) for n in ((T, K), (T, K), (T, V), (K, V)))
        S = S * (not fresh)
        room, S_out = (torch.full(n, 12345.0, device=device) for n in ((T + 3, V), (K, V)))
        kernel[(1,)](*(x.to(device) for x in (q, k, v)), room, S.to(device), S_out, T, K=K, V=V, C=C)
        if (room == 12345.0).all():
            raise NotStarted("your kernel stores nothing yet: o of a chunk, and S_out after the last chunk.")
        if not bool((room[T:] == 12345.0).all()):
            raise Wrong(f"{what}: rows past T - 1 = {T - 1} were written; the last chunk is ragged")
        q, k, v, S = (x.double() for x in (q, k, v, S))
        own, past = (q @ k.T).tril() @ v, q @ S
        want, got = own + past, room[:T].double().cpu()
        hint = "In a chunk token i sees tokens j <= i; read the state before you write the chunk into it."
        if not fresh and torch.allclose(got, own, atol=1e-2):
            hint = "The state that you were given is not read: load S_in before the loop."
        must_be_close(got, want, what, hint=hint, rtol=1e-4, atol=1e-4, what="your kernel's o")
        if (S_out == 12345.0).all():
            raise Wrong(f"{what}: o is right, but S_out is not written; store the state after the last chunk")
        must_be_close(S_out, S + k.T @ v, what, rtol=1e-4, atol=1e-4, what="your kernel's S_out")
    return "o and the last state agree at three sizes, a ragged last chunk and a given state included."


class _Memory:
    """The chapter's flat memory with one input and room for one output; it notes what strays."""

    def __init__(self, x):
        self.out = x.size
        # the output's place is NaN until written, and a guard stands behind it
        self.cells = np.concatenate([x.ravel(), np.full(x.size, np.nan, np.float32), np.full(99, 7.0)])
        self.wild = ""

    def load(self, p, mask=True, other=0.0):
        p, mask = np.asarray(p), np.broadcast_to(mask, np.shape(p))
        if ((p >= self.out) & mask).any() or (p[mask] < 0).any():
            self.wild = self.wild or f"a load went to address {p[mask].max()}, x ends at {self.out - 1}"
        return np.where(mask, self.cells[np.where(mask, p, 0) % self.cells.size], np.float32(other))

    def store(self, p, value, mask=True):
        p, mask = np.asarray(p), np.broadcast_to(mask, np.shape(p))
        bad = p[mask][(p[mask] < self.out) | (p[mask] >= 2 * self.out)]
        if bad.size:
            self.wild = (
                self.wild or f"a store went to address {bad[-1]}, o is {self.out} to {2 * self.out - 1}"
            )
            return
        self.cells[p[mask]] = np.broadcast_to(value, p.shape)[mask]


def _normalised(x, mean, count):
    """Rows minus a mean, over the root of their mean square; both means may be wrong on purpose."""
    return (x - mean) / np.sqrt(((x - mean) ** 2).sum(1, keepdims=True) / count + 1e-5)


def _masked_variance(x, BLOCK):
    """What comes out where masked lanes, 0 - mean, are squared too."""
    C, mean = x.shape[1], x.mean(1, keepdims=True)
    total = ((x - mean) ** 2).sum(1, keepdims=True) + (BLOCK - C) * mean**2
    return (x - mean) / np.sqrt(total / C + 1e-5)


def _row_hint(o, want, see):
    got = o.double().cpu()
    if bool((got[~see] != 0).any()):
        return "Columns right of the row's own number must come out as 0: load them as -inf."
    if bool((got.sum(1) < 0.999).any()):
        return "The row sums to less than 1: lanes beyond the row's end must not take part in the sum."
    return "Multiply by scale before the maximum is taken, and go from entry to entry by the strides given."


def _torch_and_device(kernel):
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(
            f"this puzzle needs {missing.name}: open the chapter in Colab, or in Jupyter on Linux"
        ) from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    return torch, "cuda" if torch.cuda.is_available() else "cpu"
