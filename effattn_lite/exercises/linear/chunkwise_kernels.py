"""Checkers of the exercises in book/linear/chunkwise_kernels.md. NumPy alone at import."""

import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: the engine's cut of 16,384 tokens, 8 heads of 64, on 108 processors.

    Args:
        answer: (tokens of a segment, segments, programs of the read, bytes of all states, bytes that
            are read of them).
    """
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted("put five numbers in the place of the dots.") from None
    if len(got) != 5:
        raise Wrong(f"give five numbers; you gave {len(got)}")
    expected = (320, 52, 416, 52 * 8 * 64 * 64 * 4, 52 * 51 // 2 * 8 * 64 * 64 * 4)
    names = ("tokens of a segment", "segments", "programs", "bytes of all states", "bytes of their reads")
    hints = (
        "16,384 tokens of 8 heads over 4 * 108 programs is 304 tokens, and a segment is a multiple of 64",
        "16,384 / 320, rounded up: the last segment is shorter",
        "one program a segment, head and tile of 64 columns; V = 64 is one tile",
        "a state of a head has 64 * 64 float32 numbers, and room is made for one a segment",
        "segment j reads the j - 1 states before it, so a head's reads are n (n - 1) / 2",
    )
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if not math.isclose(x, y, rel_tol=5e-3):
            raise Wrong(f"{name}: you gave {x:.6g}; {hint}")
    return "all five are right: the states are read back for 174 MB, where q, k, v and o together are 67 MB."


def exercise_3(enter):
    """Code: the states that enter all segments, from what each segment writes, in both directions.

    Args:
        enter: function (U [n, K, V], lengths [n], g, S [K, V], reverse) -> [n, K, V]; S comes in at
            the end where the walk begins.
    """
    rng = np.random.default_rng(3)
    for lengths, g in (
        ([4, 4, 4], -0.1),
        ([4, 4, 1], -0.3),
        ([3], -0.5),
        ([5, 5, 5, 2], -2.0),
        ([2, 2], 0.0),
    ):
        n = len(lengths)
        U, S = rng.normal(size=(n, 3, 2)), rng.normal(size=(3, 2))
        passed = np.repeat(lengths, n).reshape(n, n)  # [i, j]: tokens passed at segment i on the way to j
        for reverse in (False, True):
            got = enter(U.copy(), np.array(lengths), g, S.copy(), reverse)
            want = _entering(U, passed, g, S, reverse)
            mistakes = (
                (passed[:1, :1] + 0 * passed, S, reverse, "The last one is shorter."),
                (np.roll(passed, 1 if reverse else -1, 0), S, reverse, "Passed, not entered next."),
                (passed, S, not reverse, "They come from the other side here."),
                (passed, 0 * S, reverse, "The state S that comes in from outside is missing."),
            )
            hint = "A state fades by the tokens of the segments that it passes."
            for table, first, way, words in mistakes:
                other = _entering(U, table, g, first, way)
                if np.shape(got) == want.shape and np.allclose(got, other) and not np.allclose(got, want):
                    hint = f"{hint} {words}"
                    break
            given = f"segments of {lengths} tokens, g = {g}, from the {'right' if reverse else 'left'}"
            must_be_close(got, want, given, hint=hint)
    return "five texts agree in both directions, a ragged last segment and a text of one segment included."


def exercise_4(kernel):
    """Kernel puzzle: what every segment of a text writes into an empty state, chunk by chunk.

    Args:
        kernel: @triton.jit function (k, v, out, g, T, L, K, V, C), the last three constexpr; program j has
            segment j; k [T, K], v [T, V], out [segments, K, V], contiguous float32; g a float.
    """
    torch, device = _torch_and_device(kernel)
    gen = torch.Generator().manual_seed(4)
    untouched = 12345.0
    for T, L, K, V, C, g in (
        (32, 16, 16, 16, 16, -0.1),
        (64, 32, 16, 32, 16, -0.05),
        (75, 32, 32, 16, 16, -0.2),
        (70, 48, 16, 16, 16, 0.0),
        (64, 64, 16, 16, 32, -20.0),
    ):
        what = f"T={T}, segments of {L}, chunks of {C}, K={K}, V={V}, g={g}"
        k, v = torch.randn(T, K, generator=gen), torch.randn(T, V, generator=gen)
        n = -(-T // L)
        out = torch.full((n + 1, K, V), untouched, device=device)
        kernel[(n,)](k.to(device), v.to(device), out, g, T, L, K=K, V=V, C=C)
        if (out == untouched).all():
            raise NotStarted(
                "your kernel stores nothing yet: the state of segment j goes to out + j * K * V."
            )
        if not bool((out[n] == untouched).all()):
            raise Wrong(f"{what}: something was written behind the last segment's state")
        want = torch.stack([_written(k, v, g, a, min(a + L, T)) for a in range(0, T, L)])
        got = out[:n].double().cpu()
        must_be_close(got, want, what, hint=_write_hint(got, want, k, v, g, T, L), rtol=1e-4, atol=1e-5)
    return (
        "five texts agree: ragged segments and chunks, no decay, and one that wipes the state at every token."
    )


def exercise_5(peak):
    """Code: MiB of scratch and output that the delta engine's forward holds at once, in 16 bits.

    Args:
        peak: function (T, H, K, V, C) -> MiB.
    """
    for T, H, K, V, C in ((8192, 16, 128, 128, 64), (4096, 4, 64, 128, 32), (1024, 2, 128, 64, 64)):
        got, want = peak(T, H, K, V, C), 2 * T * H * (K + 2 * V + C) / 2**20
        hint = "o, W, U and P exist at once, two bytes a number; P has a row of C scores for each token."
        must_be_close(got, want, f"T={T}, H={H}, K={K}, V={V}, C={C}", hint=hint, rtol=1e-9)
    from effattn_lite import data

    rows = [r for r in data.results("deltanet")["rows"] if (r["impl"], r["pass"]) == ("triton", "forward")]
    found = rows[0]["peak_mib"]
    must_be_close(peak(8192, 16, 128, 128, 64), found, "the recorded run", rtol=5e-3)
    return f"three sizes agree, and the recorded run held {found:g} MiB: no state of a chunk is among them."


def _entering(U, passed, g, S, reverse):
    """The states that enter; passed[i, j]: tokens that a state fades by at segment i on its way to j."""
    out = np.repeat(S[None], len(U), 0)
    for j in range(len(U)):
        for i in range(len(U) - 1, j, -1) if reverse else range(j):
            out[j] = np.exp(g * passed[i, j]) * out[j] + U[i]
    return out


def _written(k, v, g, first, last):
    k, v = k[first:last].double(), v[first:last].double()
    fade = (g * (len(k) - 1 - np.arange(len(k))))[:, None]
    return k.T @ (v * k.new_tensor(np.exp(fade)))


def _write_hint(got, want, k, v, g, T, L):
    import torch

    late = torch.stack(
        [math.exp(g) * _written(k, v, g, a, min(a + L, T)) for a in range(0, T, L)]
    )  # one step too many
    if g and torch.allclose(got, late, rtol=1e-3, atol=1e-4):
        return "Every write fades one step too often: the chunk's last token is not decayed at all."
    if bool(torch.isnan(got).any() | torch.isinf(got).any()):
        return (
            "An exponent was positive: count n - 1 - i, the steps until the chunk is over, and never below 0."
        )
    if not bool(torch.allclose(got[-1], want[-1], rtol=1e-3, atol=1e-4)):
        return "The last segment has T - j L tokens, its last chunk n of them: the state fades by n, not C."
    return (
        "A chunk of n tokens: the state fades by e^(g n), then takes in k_i v_i, faded by e^(g (n - 1 - i))."
    )


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
