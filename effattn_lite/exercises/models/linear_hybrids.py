"""Checkers of the exercises in book/models/linear_hybrids.md. NumPy alone at import."""

import math
from collections import Counter

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close


def exercise_1(answer):
    """By hand: bytes of a token, bytes of the states, a break-even, a quotient, a factor of the residual.

    Args:
        answer: (token_bytes, state_bytes, even, times, alpha).
    """
    expected = (8192, 10_485_760, 256, 48 / (8 + 10 / 1024), 1 / math.sqrt(2 ** (1 / 16) - 1))
    try:
        got = tuple(float(x) for x in answer)
    except (TypeError, ValueError):
        raise NotStarted("put your five numbers in the place of the dots.") from None
    if len(got) != 5:
        raise Wrong(
            f"Give five numbers, (token_bytes, state_bytes, even, times, alpha); you gave {len(got)}."
        )
    names = ("token_bytes", "state_bytes", "even", "times", "alpha")
    hints = (
        "eight layers have attention, each keeps a key and a value of 4 heads of 64 numbers of 2 bytes",
        "forty layers, 16 heads, a table of 64 by 64 numbers of 4 bytes in each",
        "a state layer's bytes over the bytes that an attention layer adds with a token",
        "48 layers of 1 GiB each over the hybrid's 8 GiB and its states",
        "32 factors rho of the stream make one half, and rho is alpha / sqrt(alpha^2 + 1)",
    )
    for name, x, y, hint in zip(names, got, expected, hints, strict=True):
        if not math.isclose(x, y, rel_tol=5e-3 if y < 100 else 1e-9):
            raise Wrong(f"`{name}`: you gave {x:,.6g}. Hint: {hint}.")
    return "8 KiB a token, 10 MiB of states, even at 256 tokens, six times smaller, and alpha = 4.75."


def exercise_2(twin):
    """Proof and code: another text that one attention layer without positions cannot tell from the first.

    Args:
        twin: function (tokens [T]) -> tokens [T], for a text of pairs that ends with the first key.
    """
    rng = np.random.default_rng(2)
    attend = _blind_layer(rng)
    for pairs in (2, 3, 8):
        keys, values = rng.permutation(np.arange(1, 10))[:pairs], rng.permutation(np.arange(10, 20))[:pairs]
        text = np.append(np.stack([keys, values], 1).ravel(), keys[0])
        other = twin(text.copy())
        if other is None or other is ...:
            raise NotStarted("return a text in the place of the dots.")
        other, given = np.asarray(other), f"the text {text.tolist()}"
        if other.shape != text.shape or other.dtype.kind not in "iu":
            raise Wrong(f"Given {given}, expected {len(text)} integers, got {other.tolist()}.")
        if other[-1] != text[-1]:
            raise Wrong(
                f"Given {given}, your text asks for {other[-1]}, expected the same question, {text[-1]}."
            )
        if Counter(other.tolist()) != Counter(text.tolist()):
            raise Wrong(
                f"Given {given}, your text {other.tolist()} has other tokens, or another number of some."
            )
        told = dict(zip(other[:-1:2].tolist(), other[1:-1:2].tolist(), strict=True))
        if not set(told) <= set(keys.tolist()):
            raise Wrong(f"Given {given}, your text {other.tolist()} has a value where a key belongs.")
        if told.get(int(text[-1])) == values[0]:
            raise Wrong(
                f"Given {given}, the answer to your text is {values[0]} as well: which two may change places?"
            )
        must_be_close(attend(other), attend(text), given, what="the layer on your text", rtol=1e-9)
    return "Three texts and their twins: the layer's last output is the same, so one of its answers is wrong."


def _blind_layer(rng):
    """One attention layer without positions, random weights: tokens [T] -> what the last one gets."""
    embedding, *w = rng.normal(size=(20, 16)), *rng.normal(size=(3, 16, 16)) / 4

    def attend(tokens):
        x = embedding[tokens]
        q, k, v = x[-1] @ w[0], x @ w[1], x @ w[2]
        p = np.exp(k @ q / 4)
        return p @ v / p.sum()

    return attend


PRICES = {"A": (8, 4096, None), "W": (8, 4096, 4095), "M": (573_440, 0, None), "L": (2_097_152, 0, None)}
"""Letter -> bytes of its cache at the start, bytes a token in sight adds, and most tokens in sight."""


def exercise_3(ledger):
    """Code: bytes of the cache of a pattern.

    Args:
        ledger: function (pattern, depth, length, prices) -> bytes.
    """
    for pattern, depth, length in (
        ("A", 32, 1000),
        ("MMMMAMMM", 32, 262_144),
        ("MMMMAMMM", 13, 500),
        ("WWWWWA", 26, 100_000),
        ("WA", 3, 4095),
        ("LLLLLLLA", 80, 0),
        ("MLW", 7, 5000),
    ):
        letters = [pattern[i % len(pattern)] for i in range(depth)]
        want = 0
        for letter in letters:
            start, each, most = PRICES[letter]
            want += start + each * (length if most is None else min(length, most))
        got = ledger(pattern, depth, length, dict(PRICES))
        hint = "The pattern is repeated until there are `depth` layers, and cut there."
        if "W" in pattern and length > 4095:
            hint = "A window keeps no more tokens than it sees, whatever the length."
        must_be_close(
            got, want, f"{pattern!r}, {depth} layers, {length} tokens", hint=hint, what="`ledger`", rtol=1e-12
        )
    return "Seven models: repeated and cut patterns, windows that are full and that are not, an empty text."


def exercise_4(gradient):
    """Code: the gradient that reaches a router's logits, with and without renormalised weights.

    Args:
        gradient: function (logits [E], worth [E], top, normalise) -> [E]; worth is dy . E_e(x).
    """
    rng = np.random.default_rng(4)
    for experts, top, normalise in (
        (4, 2, False),
        (4, 2, True),
        (5, 1, False),
        (5, 1, True),
        (3, 3, False),
        (8, 3, True),
    ):
        logits, worth = rng.normal(size=experts), rng.normal(size=experts)

        def loss(z, worth=worth, top=top, normalise=normalise):
            p = np.exp(z - z.max())
            p /= p.sum()
            best = np.argsort(-p)[:top]
            return (p[best] / (p[best].sum() if normalise else 1)) @ worth[best]

        step = 1e-6 * np.eye(experts)
        want = np.array([(loss(logits + e) - loss(logits - e)) / 2e-6 for e in step])
        given = f"{experts} experts, top {top}, normalise {normalise}"
        hint = "The chosen weights are a softmax of the chosen logits alone." if normalise else (
            "A softmax is over all experts: raising a logit that was not chosen lowers the others' shares."
        )  # fmt: skip
        got = gradient(logits.copy(), worth.copy(), top, normalise)
        must_be_close(got, want, given, hint=hint, what="`gradient`", rtol=1e-6, atol=1e-8)
    return "Six routers agree; with one expert and renormalised weights no gradient is left."


def exercise_5(kernel):
    """Kernel puzzle: a norm and a scaled residual in one pass.

    Args:
        kernel: @triton.jit function (x_ptr, y_ptr, weight_ptr, out_ptr, alpha, beta, eps, D, BLOCK), BLOCK a
            tl.constexpr. Program i has row i of x, y and out, contiguous [n, D]; BLOCK is a power
            of two, at least D.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        raise Wrong(
            f"This puzzle needs {missing.name}: open the chapter in Colab or Jupyter on Linux."
        ) from None
    if kernel is None or not hasattr(kernel, "run"):
        raise NotStarted("write the kernel and decorate it with @triton.jit.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gen = torch.Generator().manual_seed(0)
    for n, D, BLOCK, alpha, beta, loud in (
        (3, 16, 16, 3.5, 1.0, 1.0),
        (5, 24, 32, 2.0, 0.5, 1.0),
        (2, 33, 64, 1.0, 1.0, 1e-4),
    ):
        x, y = loud * torch.randn(n, D, generator=gen), torch.randn(n, D, generator=gen)
        weight, out = torch.randn(D, generator=gen), torch.full((n, D + 1), float("nan"))
        z = weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        want = alpha * z + beta * y
        # a row more than there are, so that writing past the end is seen
        flat = torch.full((n * D + BLOCK,), float("nan"), device=device)
        kernel[(n,)](x.to(device), y.to(device), weight.to(device), flat, alpha, beta, 1e-5, D, BLOCK=BLOCK)
        given = f"`D = {D}, BLOCK = {BLOCK}, alpha = {alpha}, beta = {beta}`"
        out, rest = flat[: n * D].view(n, D).cpu(), flat[n * D :]
        if out.isnan().all():
            raise NotStarted("the kernel stored nothing yet.")
        if not rest.isnan().all():
            raise Wrong(f"Given {given}, the kernel wrote past the last row: mask what lies beyond D.")
        hint = "Divide the sum of squares by D, not by BLOCK." if BLOCK > D else "out = alpha N(x) + beta y."
        must_be_close(out, want, given, hint=hint, what="the kernel", rtol=2e-5, atol=1e-6)
    return "Three shapes: rows that fill their block, rows that do not, and one so quiet that eps is heard."
