"""Checkers of the exercises in book/linear/mamba2.md. NumPy alone at import."""

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: entries of a matrix whose blocks have rank 1, from two diagonals.

    Args:
        answer: (M_31, M_42, M_41, numbers that fix a matrix of 1,024 rows), the matrix as in the exercise.
    """
    _started(answer)
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give four numbers: (M_31, M_42, M_41, how many numbers)") from None
    if len(got) != 4:
        raise Wrong(f"give four numbers, (M_31, M_42, M_41, how many numbers); you gave {len(got)}")
    hints = (
        "rows 2 and 3 of columns 1 and 2 form a block on and below the diagonal: M_31 M_22 = M_32 M_21",
        "M_42 M_33 = M_43 M_32",
        "M_41 M_22 = M_42 M_21, with the M_42 that you have",
    )
    for name, x, want, hint in zip(("M_31", "M_42", "M_41"), got, (12, 12, 24), hints, strict=False):
        if x != want:
            raise Wrong(f"{name}: you gave {x:g}; {hint}")
    if got[3] in (3072, 3071):
        raise Wrong(
            f"{got[3]:g} numbers write it, and some are a choice of units: which entries fix the rest?"
        )
    if got[3] != 2047:
        raise Wrong(
            f"numbers: you gave {got[3]:g}; count the entries of the diagonal and of the one below it"
        )
    return "12, 12 and 24; and 1,024 + 1,023 = 2,047 numbers fix a million entries."


def exercise_2(numbers):
    """Proof and code: a matrix whose blocks have rank 1 is a recurrence with one number of state.

    Args:
        numbers: function (M [T, T]) -> (a [T], b [T], c [T]) with M_tj = c_t a_t a_{t-1} ... a_{j+1} b_j for
            t >= j; M is lower triangular with a diagonal that is nowhere 0. a[0] is never used.
    """
    rng = np.random.default_rng(2)
    for T, what in ((2, "2 tokens"), (7, "7 tokens"), (40, "40 tokens"), (9, "a gate of 0 at token 5")):
        a, b, c = rng.uniform(0.3, 1, size=T), _away(rng, T), _away(rng, T)
        if "gate" in what:
            a[4] = 0
        M = _matrix(a, b, c)
        got = numbers(M.copy())
        _started(got)
        try:
            parts = [np.asarray(x, float) for x in got]
        except (TypeError, ValueError):
            raise Wrong("return three arrays, (a, b, c)") from None
        if len(parts) != 3 or any(x.shape != (T,) for x in parts):
            raise Wrong(f"{what}: return three arrays of shape ({T},), (a, b, c)")
        parts[0] = np.concatenate(([1.0], parts[0][1:]))
        hint = "Choose the units so that b = 1: then c is the diagonal, and a comes from the one below it."
        must_be_close(
            _matrix(*parts), M, f"the matrix of {what}", hint=hint, what="the matrix of your numbers"
        )
        x, state, y = rng.normal(size=T), 0.0, np.zeros(T)
        for t in range(T):
            state = parts[0][t] * state + parts[1][t] * x[t]
            y[t] = parts[2][t] * state
        must_be_close(y, M @ x, f"{what} and a vector", what="the recurrence with your numbers")
    return "Four matrices came back, one with a gate of 0, and the recurrence multiplied by each of them."


def exercise_3(mask):
    """Code: the mask in float32 without the difference of two large sums.

    Args:
        mask: function (g [T], log decays <= 0, minus infinity among them) -> L [T, T] in g's dtype,
            L_tj = exp(g_{j+1} + ... + g_t) for t >= j, 0 above the diagonal.
    """
    rng = np.random.default_rng(3)
    with np.errstate(all="ignore"):
        for T in (2, 1, 9):
            g = -rng.uniform(0.01, 1, size=T)
            _mask_close(mask(g.copy()), g, f"{T} usual gates", 1e-12)
        g = np.array([-0.5, -np.inf, -0.25, -0.125, -np.inf, -1.0])
        got = mask(g.copy())
        _started(got)
        if np.isnan(np.asarray(got, float)).any():
            raise Wrong(
                "gates of minus infinity, which forget everything, give NaN: infinity minus infinity. "
                "Add gates up from j + 1 to t, and subtract nothing"
            )
        _mask_close(got, g, "two gates of minus infinity", 1e-12)
        g = np.where(np.arange(96) % 3 == 1, -3000.0, -1e-4).astype(np.float32)
        g[40:] = -1e-4
        got = mask(g.copy())
        if np.asarray(got).dtype != np.float32:
            raise Wrong(f"for gates in float32 your mask is {np.asarray(got).dtype}; keep the dtype of g")
        _mask_close(got, g, "float32, weak gates behind gates of -3000", 1e-5)
    return "Usual gates, resets to nothing, and weak gates behind strong ones: all to the last digits."


def exercise_4(pass_states):
    """Code: step 4 as one product with a mask over chunks.

    Args:
        pass_states: function (U [NC, K, V], total [NC], log decay of each whole chunk) -> states
            [NC, K, V], the state before each chunk; the first is zero.
    """
    rng = np.random.default_rng(4)
    for NC, K, V in ((2, 2, 3), (1, 2, 3), (5, 4, 2), (12, 3, 3)):
        for strong in (1.0, 300.0):
            U, total = rng.normal(size=(NC, K, V)), -strong * rng.uniform(0.1, 1, size=NC)
            with np.errstate(all="ignore"):
                got = pass_states(U.copy(), total.copy())
            _started(got)
            want, S = [], np.zeros((K, V))
            for i in range(NC):
                want.append(S)
                S = np.exp(total[i]) * S + U[i]
            what = f"{NC} chunks with decays up to e^-{strong:g}"
            if np.shape(got) == (NC, K, V) and NC > 1 and np.allclose(got[:-1], want[1:]):
                raise Wrong(
                    f"{what}: these are the states behind the chunks; shift by one, the first is zero"
                )
            hint = "Chunk j's U has met the gates of chunks j + 1 .. i - 1 when chunk i begins."
            must_be_close(got, np.array(want), what, hint=hint)
    U, total = rng.normal(size=(3, 2, 2)), np.array([-1.0, -np.inf, -2.0])
    with np.errstate(all="ignore"):
        got = pass_states(U, total)
    must_be_close(got[2], U[1], "a chunk that forgets everything", hint="Subtract no infinite sums.")
    return "Eight cases agree with the recurrence over chunks, and one in which a chunk forgets everything."


def exercise_5(kernel):
    """Kernel puzzle: the blocks on the diagonal, one program a chunk.

    Args:
        kernel: @triton.jit function (q_ptr, k_ptr, v_ptr, g_ptr, o_ptr, T, K, V, C); q, k [T, K],
            v, o [T, V], g [T], contiguous float32; the last three are tl.constexpr.
    """
    try:
        import torch
        import triton
    except ImportError as missing:
        raise Wrong(f"this puzzle needs {missing.name}: open it in Colab or Jupyter on Linux") from None
    if not hasattr(kernel, "run"):
        raise Wrong("decorate the kernel with @triton.jit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(5)
    for T, C, K, V, gates in (
        (32, 16, 16, 16, (-0.1,)),
        (40, 16, 16, 32, (-0.05, -0.7)),
        (9, 16, 32, 16, (0.0,)),
        (48, 16, 16, 16, (0.0, -20.0, -0.1)),
    ):
        what = f"T={T}, C={C}, K={K}, V={V}, gates {', '.join(map(str, gates))}"
        q, k, v = rng.normal(size=(T, K)), rng.normal(size=(T, K)), rng.normal(size=(T, V))
        g = np.array(gates)[np.arange(T) % len(gates)]
        tensors = [torch.tensor(x, dtype=torch.float32, device=device) for x in (q, k, v, g)]
        # one row more, to see whether lanes past T store
        o = torch.full((T + C, V), float("nan"), device=device)
        kernel[(triton.cdiv(T, C),)](*tensors, o, T, K=K, V=V, C=C)
        got = o.double().cpu().numpy()
        if not np.isnan(got[T:]).all():
            raise Wrong(f"{what}: you stored past token {T}; mask the store")
        if np.isnan(got[:T]).any():
            raise Wrong(
                f"{what}: parts of o are NaN or were never stored; load lanes past T as 0, "
                "and exponentiate no positive difference"
            )
        want, unmasked = np.zeros((T, V)), np.zeros((T, V))
        for start in range(0, T, C):
            part = slice(start, min(start + C, T))
            scores = q[part] @ k[part].T
            want[part] = (_exact_mask(g[part]) * scores) @ v[part]
            unmasked[part] = (np.tri(len(scores)) * scores) @ v[part]
        off = np.abs(got[:T] - want).max()
        if off > 1e-3 * np.abs(want).max():
            hint = "token i reads j <= i of its own chunk, faded by e^(g_{j+1} + ... + g_i)"
            if np.allclose(got[:T], unmasked, rtol=1e-3, atol=1e-3):
                hint = "the scores are right, the decay between i and j is missing"
            raise Wrong(f"{what}: off by {off:.2g}; {hint}")
    return "Four shapes agree: a ragged end, K != V, no decay, and gates of 0 and -20 side by side."


def _started(answers):
    if answers is None or answers is ...:
        raise NotStarted("replace the dots by your answer, then run the cell again.")
    if isinstance(answers, tuple) and any(x is ... for x in answers):
        raise NotStarted("replace the dots by your answer, then run the cell again.")


def _away(rng, T):
    # numbers away from 0, of both signs
    return rng.uniform(0.5, 2, size=T) * rng.choice((-1, 1), size=T)


def _matrix(a, b, c):
    T = len(a)
    return np.array(
        [[c[t] * np.prod(a[j + 1 : t + 1]) * b[j] if j <= t else 0.0 for j in range(T)] for t in range(T)]
    )


def _exact_mask(g):
    T, g = len(g), np.asarray(g, np.float64)
    return np.array([[np.exp(g[j + 1 : t + 1].sum()) if j <= t else 0.0 for j in range(T)] for t in range(T)])


def _mask_close(got, g, what, rtol):
    _started(got)
    want = _exact_mask(g)
    got = np.asarray(got, float)
    if got.shape == want.shape:
        if np.abs(np.triu(got, 1)).max() > 0:
            raise Wrong(f"{what}: above the diagonal the mask is 0, yours is not")
        if len(g) > 1 and not np.allclose(np.diag(got), 1):
            raise Wrong(f"{what}: on the diagonal the sum is empty and the entry 1; g_j itself is not in it")
    hint = "A difference of two sums loses the digits of the smaller: sum each stretch by itself."
    must_be_close(got, want, what, hint=hint, rtol=rtol, what="your mask")
