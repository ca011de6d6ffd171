"""Interactive figure of book/linear/bidirectional.md: real attention maps, squeezed through a few rows."""

from base64 import b64encode

import numpy as np

from effattn_lite import data
from effattn_lite.explore.figure import Explorable

HEADS = ((0, 0), (1, 4), (2, 4))
"""Place in the arrays: two heads that look for one word, and one that rests on the first token."""

TOKENS, STARTS, FIRST_QUERY = 48, 24, 100
STEPS, RATE = 300, {"linformer": 0.02, "luna": 0.05}
WAYS = ("best", "linformer", "luna")


class Squeeze(Explorable):
    """48 queries look at 48 keys; their map goes through M rows, chosen in three ways.

    The page has the scores, so it computes the maps, their singular values, and trains E, F and P itself.

    Args:
        head: 0 to 2, of `HEADS`.
        start: the keys' first token, 0 to 24; the queries stay tokens 100 to 147.
        rows: M, 1 to 16.
        how: "best", the singular vectors of the map shown; "linformer"; "luna".
        trained: the start at which the last two were trained.
    """

    name = "squeeze"
    alt = (
        "Attention map of a head of SmolLM2, 48 queries by 48 keys, beside the map that is left when it "
        "has gone through a few rows, and bars of its singular values. Choose the head, the rows, the first "
        "token of the text and who squeezes; the errors of the map and of the outputs follow."
    )

    def __init__(self, head=0, start=8, rows=4, how="linformer", trained=8):
        if how not in WAYS:
            raise ValueError(f"how is {how!r}, expected one of {', '.join(WAYS)}")
        for what, x, low, high in (
            ("head", head, 0, len(HEADS) - 1),
            ("start", start, 0, STARTS),
            ("rows", rows, 1, 16),
            ("trained", trained, 0, STARTS),
        ):
            if not low <= x <= high:
                raise ValueError(f"{what} is {x}, expected {low} to {high}")
        d = data.load("smollm2_qkv")
        names = [f"layer {d['layers'][i]}, head {d['heads'][i, h]}" for i, h in HEADS]
        super().__init__(
            head=head, start=start, rows=rows, how=how, trained=trained, names=names,
            heads=[_packed(*head_arrays(i)) for i in range(len(HEADS))],
            words=[w.strip() or "line break" for w in d["tokens"][: TOKENS + STARTS].tolist()],
        )  # fmt: skip


def head_arrays(head):
    """Scores [48, 72] of a head in `HEADS`, its values [72, 64], and what Luna packs by, [72, 64]."""
    d, (layer, h) = data.load("smollm2_qkv"), HEADS[head]
    q, k, v = (d[name][layer].astype(float) for name in "qkv")
    group, near = q.shape[1] // k.shape[1], slice(TOKENS + STARTS)
    k, v = k[near, h // group], v[near, h // group]
    asked = np.arange(FIRST_QUERY, FIRST_QUERY + TOKENS)
    theta = float(d["rope_theta"])
    x = _rotated(q[asked, h], asked, theta) @ _rotated(k, np.arange(len(k)), theta).T / 8
    return x, v, (k - k.mean(0)) / 8


def squeezed(head, start, rows, how, trained):
    """The map [48, 48], what the figure shows beside it, and the relative errors of map and outputs."""
    x, v, c = head_arrays(head)
    part, taught = (slice(a, a + TOKENS) for a in (start, trained))
    P = _softmax(x[:, part])
    if how == "best":
        U, s, W = np.linalg.svd(P)
        Q = (U[:, :rows] * s[:rows]) @ W[:rows]
    else:
        params = train(x[:, taught], c[taught], rows, how)
        if how == "linformer":
            E, F = params
        else:
            E = F = _softmax(params[0] @ c[part].T).T
        Q = _softmax(x[:, part] @ E) @ F.T
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in ((Q, P), (Q @ v[part], P @ v[part]))]
    return P, Q, errors


def train(x, c, rows, how):
    """E and F, or the packing queries P, after 300 steps of Adam on the squared error of one map."""
    P, T = _softmax(x), len(x)
    slot = np.arange(T) * rows // T
    means = (slot[:, None] == np.arange(rows)) / np.bincount(slot)[slot][:, None]
    picked = c[np.arange(rows) * (T - 1) // max(1, rows - 1)]
    params = [means, means.copy()] if how == "linformer" else [picked.copy()]
    moments = [[0 * p, 0 * p] for p in params]
    for step in range(1, STEPS + 1):
        for i, slope in enumerate(_slopes(params, x, P, c)):
            m, w = moments[i]
            m, w = moments[i] = [0.9 * m + 0.1 * slope, 0.999 * w + 0.001 * slope**2]
            move = (m / (1 - 0.9**step)) / (np.sqrt(w / (1 - 0.999**step)) + 1e-8)
            params[i] = params[i] - RATE[how] * move
    return params


def _slopes(params, x, P, c):
    """Gradients of half the squared error of the map, by E and F, or by the packing queries."""
    A = None if len(params) == 2 else _softmax(params[0] @ c.T)
    E, F = params if A is None else (A.T, A.T)
    S = _softmax(x @ E)
    off = S @ F.T - P
    dS = off @ F
    dx = S * (dS - (S * dS).sum(1, keepdims=True))
    dE, dF = x.T @ dx, off.T @ S
    if A is None:
        return dE, dF
    dA = (dE + dF).T
    return ((A * (dA - (A * dA).sum(1, keepdims=True))) @ c,)


def _packed(x, v, c):
    """Scores in 16 bits; values and what packing looks at in 8."""
    packed = {}
    for name, y, kind in (("scores", x, np.int16), ("values", v, np.int8), ("contents", c, np.int8)):
        size = np.abs(y).max() / np.iinfo(kind).max
        packed[name] = {"size": size, "bytes": b64encode(np.round(y / size).astype(kind).tobytes()).decode()}
    return packed


def _softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _rotated(x, place, theta):
    half = x.shape[1] // 2
    angle = place[:, None] * theta ** (-np.arange(half) / half)
    a, b, cos, sin = x[:, :half], x[:, half:], np.cos(angle), np.sin(angle)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=1)
