"""Checkers of the exercises in book/linear/fixed_decay.md. NumPy alone at import."""

import math
import tracemalloc
from functools import reduce

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong


def exercise_1(answer):
    """By hand: half-lives of RetNet's heads, and the best clock for one distance.

    Args:
        answer: (first head with a half-life above 10,000 tokens, tokens until head 0 keeps less than 1 %,
            best half-life for facts 500 tokens old, in tokens).
    """
    _started(answer)
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give three numbers: (head, tokens, half-life)") from None
    if len(got) != 3:
        raise Wrong(f"give three numbers, (head, tokens, half-life); you gave {len(got)}")
    if got[0] == 10:
        raise Wrong("head: you gave 10; heads are counted from 0, so the tenth head is head 9")
    if got[0] != 9:
        raise Wrong(f"head: you gave {got[0]:g}; head h has a half-life of about 22.2 x 2^h tokens")
    if got[1] != 146:
        raise Wrong(f"tokens: you gave {got[1]:g}; solve (31/32)^n < 0.01 for the smallest whole n")
    want = 2 * math.log(2) / math.log(501 / 500)
    if abs(got[2] - want) > 0.005 * want:
        raise Wrong(
            f"half-life: you gave {got[2]:.4g} tokens; the best decay for distance d has "
            "gamma^2 = d / (d + 1), and a half-life is ln 2 / -ln gamma"
        )
    return f"Head 9 lives 11,356 tokens, head 0 is below 1 % after 146; {want:.0f} is 1.39 x 500."


def exercise_2(combine):
    """Proof and code: two stretches of the recurrence become one, in any bracketing.

    Args:
        combine: function (first, second) -> pair; a pair is (g, S): the total log decay of a stretch of
            tokens and the state [K, V] that it leaves, starting from zero. `first` is the earlier stretch.
    """
    rng = np.random.default_rng(2)
    tokens = [(-rng.uniform(0.01, 1), rng.normal(size=(3, 2))) for _ in range(7)]
    want = np.zeros((3, 2))
    for g, write in tokens:
        want = math.exp(g) * want + write
    total = sum(g for g, _ in tokens)

    def both(first, second):
        got = _pair(combine(first, second), "combine(first, second)", "(g, S)")
        _started(got)
        return float(np.asarray(got[0], float)), np.asarray(got[1], float)

    two, right = both(tokens[0], tokens[1]), math.exp(tokens[1][0]) * tokens[0][1] + tokens[1][1]
    mirrored = math.exp(tokens[0][0]) * tokens[1][1] + tokens[0][1]
    if two[1].shape == right.shape and np.allclose(two[1], mirrored):
        raise Wrong("two tokens: you decayed the later state; it is the earlier one that fades")
    _same(two[1], right, "two tokens: the state", "the earlier state fades by the later decay, then they add")
    if not math.isclose(two[0], tokens[0][0] + tokens[1][0], rel_tol=1e-9):
        raise Wrong(f"two tokens: the decay is {two[0]:.4g}; decays multiply, so their logs add")
    orders = {
        "from the left": lambda p: reduce(both, p),
        "from the right": lambda p: reduce(lambda later, earlier: both(earlier, later), p[::-1]),
        "as a tree": lambda p: _tree(p, both),
    }
    for how, fold in orders.items():
        g, S = fold(tokens)
        _same(S, want, f"seven tokens combined {how}: the state", "is your operator associative?")
        _same(g, total, f"seven tokens combined {how}: the decay", "decays multiply, so their logs add")
    nothing = (0.0, np.zeros((3, 2)))
    for pair, side in ((both(nothing, tokens[0]), "before"), (both(tokens[0], nothing), "after")):
        _same(pair[1], tokens[0][1], f"an empty stretch {side} a token: S", "(0, 0) must change nothing")
    return "Seven tokens give one state from the left, from the right and as a tree; (0, 0) is neutral."


def exercise_3(chunkwise):
    """Code: the chunkwise form of one head.

    Args:
        chunkwise: function (q [T, K], k [T, K], v [T, V], *, g, initial_state [K, V], chunk_size) -> (o, S),
            g a float <= 0, scores not scaled.
    """
    rng = np.random.default_rng(3)
    count = 0
    for T, C in ((16, 4), (1, 4), (3, 8), (13, 4), (40, 16), (7, 1), (70, 64)):
        for g in (-0.05, 0.0, -20.0):
            q, k, v = rng.normal(size=(T, 5)), rng.normal(size=(T, 5)), rng.normal(size=(T, 3))
            for S0, start in (
                (np.zeros((5, 3)), "no initial state"),
                (rng.normal(size=(5, 3)), "an initial state"),
            ):
                what = f"T={T}, chunk_size={C}, g={g}, K=5, V=3, {start}"
                before = S0.copy()
                with np.errstate(all="ignore"):
                    got = chunkwise(q.copy(), k.copy(), v.copy(), g=g, initial_state=S0, chunk_size=C)
                o, S = _pair(got, f"chunkwise with {what}", "(o, S)")
                if not np.array_equal(S0, before):
                    raise Wrong(f"{what}: you wrote into the caller's initial_state; make a new array")
                want_o, want_S = _recurrence(q, k, v, g, S0)
                _same(o, want_o, f"{what}: o", _chunk_hint(o, want_o, C))
                hint = "key j of n fades by e^(g (n - 1 - j)), S by e^(g n)"
                _same(S, want_S, f"{what}: the final state", hint)
                count += 1
    T = 2048
    q, k, v = (rng.normal(size=(T, 4)) for _ in range(3))
    tracemalloc.start()
    try:
        chunkwise(q, k, v, g=-0.01, initial_state=np.zeros((4, 4)), chunk_size=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > 8e6:
        raise Wrong(
            f"all numbers agree, but T={T} took {peak / 1e6:.0f} MB: that is the parallel form's T x T mask. "
            "Keep scores of one chunk, [C, C], at a time"
        )
    return f"{count} cases agree with the recurrence, ragged chunks too; T={T} took {peak / 1e3:.0f} kB."


def exercise_4(step):
    """Code: one decoding step of RWKV-5 for one head.

    Args:
        step: function (q [K], k [K], v [V], *, g [K], u [K], state [K, V]) -> (o [V], new state).
    """
    rng = np.random.default_rng(4)
    for K, V in ((4, 4), (5, 3), (1, 2)):
        S, u, g = rng.normal(size=(K, V)), rng.normal(size=K), -rng.uniform(0.01, 1, size=K)
        for t in range(3):
            q, k, v = rng.normal(size=K), rng.normal(size=K), rng.normal(size=V)
            what = f"K={K}, V={V}, token {t}"
            before, kv = S.copy(), np.outer(k, v)
            try:
                got = step(q, k, v, g=g, u=u, state=S)
            except ValueError as error:
                raise Wrong(f"{what}: {error}; g and u belong to the key axis, shape [K, 1]") from None
            o, new = _pair(got, "step(...)", "(o, state)")
            if not np.array_equal(S, before):
                raise Wrong(f"{what}: your function changed the caller's state in place; make a new array")
            decayed = np.exp(g)[:, None] * S
            hints = {
                "you read after the write: RWKV-5 reads the old state, and the bonus stands for the token": (
                    q @ (decayed + kv)
                ),
                "you decayed first: the newest past token is read undecayed": q @ (decayed + u[:, None] * kv),
                "the bonus u is missing": q @ (S + kv),
                "the token itself is missing: add Diag(u) k v^T to what you read": q @ S,
            }
            if K == V:
                hints["u belongs to the key axis, shape [K, 1]"] = q @ (S + u * kv)
            hint = next((h for h, x in hints.items() if _close(o, x)), "o = (S_{t-1} + Diag(u) k v^T)^T q")
            _same(o, q @ (S + u[:, None] * kv), f"{what}: o", hint)
            hint = (
                "the new state takes the bonus: only the read-out does"
                if _close(new, decayed + u[:, None] * kv)
                else ""
            )
            _same(
                new,
                decayed + kv,
                f"{what}: the state",
                hint or "S_t = Diag(e^g) S_{t-1} + k v^T on the key axis",
            )
            S = decayed + kv
    return "Nine steps agree, K != V included: read the old state, add the bonus, then decay and write."


def exercise_5(kernel):
    """Kernel puzzle: the state before every chunk.

    Args:
        kernel: @triton.jit function (k_ptr, v_ptr, h_ptr, g, T, K, V, C), one program; the last three are
            tl.constexpr; k [T, K], v [T, V], h [NC, K, V] contiguous float32.
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
    for T, C, K, V, g in (
        (32, 16, 16, 16, -0.1),
        (40, 16, 16, 32, -0.1),
        (9, 16, 32, 16, 0.0),
        (48, 16, 16, 16, -6.0),
    ):
        what = f"T={T}, C={C}, K={K}, V={V}, g={g}"
        k, v = rng.normal(size=(T, K)), rng.normal(size=(T, V))
        NC = -(-T // C)
        h = torch.full((NC, K, V), float("nan"), device=device)
        tk, tv = (torch.tensor(x, dtype=torch.float32, device=device) for x in (k, v))
        kernel[(1,)](tk, tv, h, g, T, K=K, V=V, C=C)
        S = np.zeros((K, V))
        for i in range(NC):
            got = h[i].double().cpu().numpy()
            if np.isnan(got).all():
                raise Wrong(f"{what}: the state before chunk {i} was never stored, at h_ptr + i * K * V")
            if np.isnan(got).any():
                raise Wrong(f"{what}: parts of state {i} are NaN; load lanes past T as 0")
            if np.abs(got - S).max() > 1e-3 * max(1.0, np.abs(S).max()):
                late = i == 0 or _close(got, _states(k, v, g, C)[min(i + 1, NC)], 1e-3)
                hint = (
                    "store the state before you add the chunk, so that h[0] is zero"
                    if late
                    else "key j of the chunk fades by e^(g (C - 1 - j)), the old state by e^(g C)"
                )
                raise Wrong(f"{what}: state {i} is off by {np.abs(got - S).max():.2g}; {hint}")
            S = _states(k, v, g, C)[i + 1]
    return "Four shapes agree with the recurrence: a ragged end, K != V, no decay, and e^-6 a token."


def _started(answers):
    if isinstance(answers, tuple) and any(x is ... for x in answers):
        raise NotStarted("replace the dots by your answer, then run the cell again.")


def _recurrence(q, k, v, g, S):
    o = np.zeros_like(v)
    for t in range(len(q)):
        S = math.exp(g) * S + np.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o, S


def _states(k, v, g, C):
    # state before chunk 0, 1, ..., NC
    S, states = np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(k)):
        if t % C == 0:
            states.append(S)
        S = math.exp(g) * S + np.outer(k[t], v[t])
    return [*states, S]


def _chunk_hint(got, want, C):
    try:
        got = np.asarray(got, float)
        first = np.allclose(got[:C], want[:C], rtol=1e-9, atol=1e-9)
        apart = np.isnan(got).any()
    except (TypeError, ValueError, IndexError):
        return "return o with the shape of v"
    if apart:
        return "e^(-g j) alone overflows: exponentiate differences i - j >= 0, and mask before you multiply"
    if first and len(want) > C:
        return (
            "the first chunk is right: look at what the later ones read; S fades by e^(g (i + 1)), "
            "and key j of n enters it with e^(g (n - 1 - j))"
        )
    return "inside a chunk token i reads j <= i with e^(g (i - j)), before it S with e^(g (i + 1))"


def _tree(pairs, both):
    half = len(pairs) // 2
    return pairs[0] if len(pairs) == 1 else both(_tree(pairs[:half], both), _tree(pairs[half:], both))


def _pair(answer, call, names):
    try:
        first, second = answer
    except (TypeError, ValueError):
        raise Wrong(f"{call} returned {_short(answer)}, expected the two results {names}") from None
    return first, second


def _short(x):
    return f"an array of shape {x.shape}" if isinstance(x, np.ndarray) else repr(x)


def _close(got, want, tol=1e-9):
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return False
    return got.shape == np.shape(want) and np.allclose(got, want, rtol=tol, atol=tol)


def _same(got, want, what, hint):
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        raise Wrong(f"{what}: got {got!r}, expected numbers") from None
    want = np.asarray(want, float)
    if got.shape != want.shape:
        raise Wrong(f"{what}: the shape is {got.shape}, expected {want.shape}")
    if np.isnan(got).any():
        raise Wrong(f"{what}: there are NaNs; {hint}")
    if not _close(got, want):
        raise Wrong(f"{what}: off by up to {np.abs(got - want).max():.3g}; {hint}")
