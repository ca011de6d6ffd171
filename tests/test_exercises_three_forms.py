"""The checkers of foundations/three_forms: a right answer passes, typical wrong ones are told why."""

from itertools import accumulate

import numpy as np

from effattn_lite.exercises import check

CHAPTER = "foundations/three_forms"


def work(T):
    rounds = (T - 1).bit_length()
    return rounds, rounds * T - 2**rounds + 1


def decay_mask(g):
    t, G = np.arange(len(g)), np.cumsum(g)
    return np.exp(np.where(t[:, None] >= t, G[:, None] - G, -np.inf))


def ragged(q, k, v, g, S, lengths, *, carry=True, late=False):
    o, start = np.zeros_like(v), 0
    for n in lengths:
        now = slice(start, start + n)
        G = np.cumsum(g[now])
        into = G - g[now] if late else G
        o[now] = (q[now] @ k[now].T * decay_mask(g[now])) @ v[now] + np.exp(into)[:, None] * (q[now] @ S)
        if carry:
            S = np.exp(G[-1]) * S + k[now].T @ (np.exp(G[-1] - G)[:, None] * v[now])
        start += n
    return o, S


def scan(op, items):
    if len(items) < 2:
        return items
    odd = scan(op, [op(items[i], items[i + 1]) for i in range(0, len(items) - 1, 2)])
    return [items[0]] + [
        odd[i // 2] if i % 2 else op(odd[i // 2 - 1], items[i]) for i in range(1, len(items))
    ]


def doubling(op, items):
    d = 1
    while d < len(items):
        items = items[:d] + [op(items[i - d], items[i]) for i in range(d, len(items))]
        d *= 2
    return items


def test_by_hand():
    right = (4, 2, 17, (2**20 / 512) ** 0.5)
    assert check(f"{CHAPTER}/1", right)
    assert not check(f"{CHAPTER}/1", (..., ..., ..., ...)).started
    for place, wrong, words in (
        (0, 15, "halve the state"),
        (1, 4, "starts from zero"),
        (2, 24, "8 - 1, 8 - 2 and 8 - 4"),
        (3, 64, "C squared"),
    ):
        verdict = check(f"{CHAPTER}/1", right[:place] + (wrong,) + right[place + 1 :])
        assert not verdict and words in verdict.words


def test_work():
    assert check(f"{CHAPTER}/2", work)
    assert not check(f"{CHAPTER}/2", lambda T: None).started
    assert "T - d pairs" in check(f"{CHAPTER}/2", lambda T: (work(T)[0], T * work(T)[0])).words
    assert not check(f"{CHAPTER}/2", lambda T: (T.bit_length(), work(T)[1]))


def test_decay_mask():
    assert check(f"{CHAPTER}/3", decay_mask)
    assert not check(f"{CHAPTER}/3", lambda g: None).started
    assert "transposed" in check(f"{CHAPTER}/3", lambda g: decay_mask(g).T).words

    def ratio(g):
        beta = np.cumprod(np.exp(g))
        return np.tril(beta[:, None] / beta)

    assert "Never divide" in check(f"{CHAPTER}/3", ratio).words
    # the token's own decay, once too often
    assert "D[t, t] is 1" in check(f"{CHAPTER}/3", lambda g: decay_mask(g) * np.exp(g)).words
    assert not check(f"{CHAPTER}/3", lambda g: np.exp(np.cumsum(g)[:, None] - np.cumsum(g)))


def test_ragged():
    assert check(f"{CHAPTER}/4", ragged)
    assert not check(f"{CHAPTER}/4", lambda *x: None).started
    verdict = check(f"{CHAPTER}/4", lambda *x: ragged(*x, carry=False))
    assert not verdict and "The old state fades" in verdict.words
    assert "through the decays" in check(f"{CHAPTER}/4", lambda *x: ragged(*x, late=True)).words

    def whole(q, k, v, g, S, lengths):
        return ragged(q, k, v, g, S, (len(q),))

    assert "T x T" in check(f"{CHAPTER}/4", whole).words

    def in_place(q, k, v, g, S, lengths):
        o, S[:] = ragged(q, k, v, g, S, lengths)
        return o, S

    assert "caller's state" in check(f"{CHAPTER}/4", in_place).words


def test_scan():
    assert check(f"{CHAPTER}/5", scan)
    assert not check(f"{CHAPTER}/5", lambda op, items: None).started
    in_line = check(f"{CHAPTER}/5", lambda op, items: list(accumulate(items, op)))
    assert not in_line and "build a tree" in in_line.words
    assert "are enough" in check(f"{CHAPTER}/5", doubling).words
    turned = check(f"{CHAPTER}/5", lambda op, items: scan(lambda a, b: op(b, a), items))
    assert not turned and "the earlier stretch first" in turned.words
    assert "one for every item" in check(f"{CHAPTER}/5", lambda op, items: items[:-1]).words
