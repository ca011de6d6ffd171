"""Checkers of the exercises in book/linear/state_space.md. NumPy alone at import."""

import tracemalloc

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: one rate by three rules, where Euler's explodes, and a half-life.

    Args:
        answer: (factor of A = -2 at a step of 1 by the exact rule, by the bilinear one, by Euler's; largest
            step that Euler's rule bears for eigenvalues -1 .. -64; tokens until half of a mode with
            A = -0.5 + 3i is left, at steps of 0.1).
    """
    names = "exact", "bilinear", "Euler", "largest step", "tokens"
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    try:
        got = [float(x) for x in answer]
    except (TypeError, ValueError):
        raise Wrong(f"give five real numbers: {', '.join(names)}") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers, {', '.join(names)}; you gave {len(got)}")
    hints = (
        (np.exp(-2), "e^(step A)"),
        (0.0, "(1 + step A / 2) / (1 - step A / 2), with A = -2"),
        (-1.0, "1 + step A; it may be negative"),
        (2 / 64, "|1 - 64 step| must not be above 1, and 1 - 64 step may go down to -1"),
        (np.log(2) / 0.05, "the size of e^(step A) is e^(step Re A); the imaginary part only turns it"),
    )
    for name, x, (want, hint) in zip(names, got, hints, strict=True):
        if not abs(x - want) <= 0.01 * max(abs(want), 0.01):
            raise Wrong(f"{name}: you gave {x:.4g}; {hint}")
    return "0.135, 0 and -1 from one rate; Euler bears steps to 1/32; half is left after 13.9 tokens."


def exercise_2(gates):
    """Proof and code: what is kept and what is written where the step is a softplus.

    Args:
        gates: function (z, lam) -> (kept, written by the exact rule, written by Euler's), of numbers.
    """
    for z, lam in (
        (0.0, 1.0),
        (2.0, 1.0),
        (-3.0, 0.5),
        (1.5, 4.0),
        (-40.0, 2.0),
        (-600.0, 1.0),
        (800.0, 2.0),
    ):
        # softplus without overflow, then its exponentials without cancellation
        step = max(z, 0.0) + np.log1p(np.exp(-abs(z)))
        want = np.exp(-lam * step), -np.expm1(-lam * step) / lam, step
        with np.errstate(all="ignore"):
            got = gates(z, lam)
        if isinstance(got, tuple) and any(x is ... for x in got):
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        try:
            keep, exact, euler = (float(x) for x in got)
        except (TypeError, ValueError):
            raise Wrong(f"gates({z}, {lam}) must return three numbers: kept, exact, Euler") from None
        given = f"z = {z:g}, lam = {lam:g}"
        if lam != 1 and np.isclose(exact, want[1] * lam, rtol=1e-9, atol=0) and exact != 0:
            raise Wrong(f"Given {given}, the exact write is lam times too large: (1 - e^(-lam step)) / lam")
        if abs(z) > 30 and not all(np.isfinite((keep, exact, euler))):
            raise Wrong(f"Given {given}, a number is not finite: ln(1 + e^z) is `np.logaddexp(0, z)`")
        if z < -30 and not (np.isclose(exact, want[1], rtol=1e-9, atol=0) and euler > 0):
            raise Wrong(
                f"Given {given}, the exact write is {exact:.3g}, expected {want[1]:.3g}: 1 - e^(-a) loses "
                "all digits of a small a; `-np.expm1(-a)` keeps them"
            )
        for name, x, y in zip(
            ("kept", "exact write", "Euler's write"), (keep, exact, euler), want, strict=True
        ):
            must_be_close(x, y, given, rtol=1e-12, atol=0.0, what=f"the factor '{name}'")
    return (
        "Seven pairs are right, z = -600 and 800 too: the exact write is bounded by 1 / lam, Euler's is not."
    )


def exercise_3(long_convolution):
    """Code: a diagonal S4 channel as one long convolution.

    Args:
        long_convolution: function (x [T], dt, A [M], B [M], C [M]) -> y [T], by the bilinear rule.
    """
    rng = np.random.default_rng(3)
    for T, M, imaginary in ((16, 3, 0.0), (1, 1, 0.0), (33, 4, 5.0), (200, 8, 20.0)):
        A = -np.exp(rng.normal(size=M)) + imaginary * 1j * rng.normal(size=M)
        B, C = (rng.normal(size=M) + 1j * (imaginary > 0) * rng.normal(size=M) for _ in range(2))
        A, B, C = (part if imaginary else part.real for part in (A, B, C))
        x, dt = rng.normal(size=T), 0.1
        want, write = _diagonal(x, dt, A, B, C)
        y = long_convolution(x.copy(), dt, A, B, C)
        if y is ... or y is None:
            raise NotStarted("replace the dots by your answer, then run the cell again.")
        given = f"T = {T}, M = {M}, {'complex' if imaginary else 'real'} rates"
        if np.iscomplexobj(y):
            raise Wrong(f"Given {given}, your y is complex: take the real part of the kernel")
        must_be_close(y, want, given, rtol=1e-8, atol=1e-10, hint=_hint(y, x, write, dt, A, B, C))
    T = 4096
    x, A, B, C = rng.normal(size=T), -np.arange(1.0, 5), np.ones(4), np.ones(4)
    tracemalloc.start()
    try:
        long_convolution(x, 0.01, A, B, C)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 16e6:
        raise Wrong(
            f"all numbers agree, but T = {T} took {peak / 1e6:.0f} MB: that is a table of T x T. "
            "Multiply Fourier transforms instead"
        )
    return f"Four lengths agree with the recurrence, complex rates too; T = {T} took {peak / 1e3:.0f} kB."


def exercise_4(clock):
    """Code: steps that skip commas and forget at a sign.

    Args:
        clock: function (tokens [T] of integers) -> dt [T]; 0 is a comma, 1 says forget, 2 and up are words.
    """
    rng = np.random.default_rng(4)
    rates = -np.arange(1.0, 9)
    texts = [np.array(t) for t in ([2, 3], [2, 0, 0, 3], [2, 1, 3], [0, 2, 0, 1, 0], [4, 1, 1, 2, 0, 5])]
    texts += [rng.choice(6, size=60, p=[0.5, 0.05, 0.1, 0.15, 0.1, 0.1]) for _ in range(20)]
    for tokens in texts:
        dt = np.asarray(clock(tokens.copy()), float)
        given = f"the tokens {tokens.tolist()[:12]}{' ...' if len(tokens) > 12 else ''}"
        if dt.shape != tokens.shape:
            raise Wrong(f"Given {given}, dt has shape {dt.shape}, expected {tokens.shape}")
        if not (dt >= 0).all() or not np.isfinite(dt).all():
            raise Wrong(f"Given {given}, a step is negative or not finite: time does not run backwards")
        last = max(np.flatnonzero(tokens == 1), default=-1)
        words = tokens[last + 1 :][tokens[last + 1 :] > 1]
        want = _state(words, np.full(len(words), 0.1), rates)
        got = _state(tokens, dt, rates)
        off = np.abs(got - want).max()
        if off > 1e-9:
            raise Wrong(f"Given {given}, the state is off by {off:.2g}; {_clock_hint(tokens, dt, rates)}")
    return f"{len(texts)} texts leave the state of their last words alone, whatever commas stand between."


def exercise_5(kernel):
    """Kernel puzzle: one channel of a selective scan a program.

    Args:
        kernel: @triton.jit function (x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, y_ptr, h_ptr, T, M), a program a
            channel; M is tl.constexpr; all tensors contiguous float32.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(f"this puzzle needs {missing.name}: open it in Colab or Jupyter on Linux") from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(5)
    for T, D, M in ((6, 1, 4), (9, 3, 16), (1, 2, 8)):
        what = f"T = {T}, D = {D}, M = {M}"
        x, B, C = rng.normal(size=(T, D)), rng.normal(size=(T, M)), rng.normal(size=(T, M))
        dt, A = rng.uniform(0, 1, (T, D)), -np.exp(rng.normal(size=(D, M)))
        parts = [torch.tensor(a, dtype=torch.float32, device=device) for a in (x, dt, A, B, C)]
        y, h = (torch.full(shape, float("nan"), device=device) for shape in ((T, D), (D, M)))
        kernel[(D,)](*parts, y, h, T, M=M)
        want, state, before = np.zeros((T, D)), np.zeros((D, M)), np.zeros((T, D))
        for t in range(T):
            before[t] = state @ C[t]
            state = np.exp(dt[t][:, None] * A) * state + (dt[t] * x[t])[:, None] * B[t]
            want[t] = state @ C[t]
        for name, got, right in (("y", y, want), ("h", h, state)):
            got = got.double().cpu().numpy()
            if np.isnan(got).all():
                raise Wrong(f"{what}: {name} was never stored")
            if np.isnan(got).any():
                raise Wrong(f"{what}: parts of {name} are NaN: token t of channel d lies at t * D + d")
            if np.abs(got - right).max() > 1e-4 * max(1.0, np.abs(right).max()):
                early = name == "y" and np.allclose(got, before, atol=1e-4)
                hint = "read after you write" if early else "fade by e^(dt A), then add dt x B"
                raise Wrong(f"{what}: {name} is off by {np.abs(got - right).max():.2g}; {hint}")
    return "Three shapes agree with the recurrence, and no state but the last left the program."


def _diagonal(x, dt, A, B, C):
    # the recurrence of a diagonal model by the bilinear rule, and its input factor
    half = dt / 2 * A
    keep, write = (1 + half) / (1 - half), dt * B / (1 - half)
    h, y = np.zeros(len(A), np.result_type(A, B, C, float)), np.zeros(len(x))
    for t, x_t in enumerate(x):
        h = keep * h + write * x_t
        y[t] = (C * h).sum().real
    return y, write


def _hint(y, x, write, dt, A, B, C):
    T = len(x)
    half = dt / 2 * A
    y = np.asarray(y)

    def echo(keep, write, length):
        taps = ((keep ** np.arange(T)[:, None]) @ (C * write)).real
        return np.fft.irfft(np.fft.rfft(x, length) * np.fft.rfft(taps, length), length)[:T]

    keep = (1 + half) / (1 - half)
    if y.shape != x.shape:
        return f"Return one number a token, shape {x.shape}."
    if T > 1 and np.allclose(y, echo(keep, write, T)):
        return "That is a convolution on a circle: pad both to 2 T before you transform, and cut."
    if np.allclose(y, echo(np.exp(dt * A), write, 2 * T)) or np.allclose(
        y, echo(np.exp(dt * A), dt * B, 2 * T)
    ):
        return "The factor is e^(dt A): the bilinear rule is asked for."
    if np.allclose(y, echo(keep, dt * B, 2 * T)):
        return "B-bar is dt B / (1 - dt A / 2)."
    return "kernel[l] = Re sum_m C A-bar^l B-bar."


def _state(tokens, dt, rates):
    h = np.zeros_like(rates)
    for token, step in zip(tokens, dt, strict=True):
        h = np.exp(step * rates) * h + step * (token if token > 1 else 0)
    return h


def _clock_hint(tokens, dt, rates):
    if (dt[tokens == 0] > 0).any():
        return "a comma must take no time"
    if (np.abs(dt[tokens > 1] - 0.1) > 1e-12).any():
        return "a word takes 0.1"
    if len(dt[tokens == 1]) and dt[tokens == 1].min() * -rates.max() < 25:
        return "the step of a 1 is too short: the slowest state, with rate -1, still holds what was before"
    return "a 1 wipes by a long step"
