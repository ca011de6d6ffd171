"""The checkers of foundations/how_to_compare: a right answer passes, typical wrong ones are told why."""

from functools import cache

import numpy as np
import pytest

from effattn_lite.exercises import check
from effattn_lite.explore import RateDial
from effattn_lite.explore.rate_dial import most_frequent

CHAPTER = "foundations/how_to_compare"


@cache
def right(counts):
    if not counts:
        return 0.0
    n = sum(counts)
    rests = ([*counts[:i], c - 1, *counts[i + 1 :]] for i, c in enumerate(counts))
    return max(counts) / n + sum(
        c / n * right(tuple(sorted(x for x in rest if x))) for c, rest in zip(counts, rests, strict=True)
    )


def told(values):
    return right(tuple(sorted(values.count(v) for v in set(values)))) / len(values)


def difference(first, second):
    d = first.mean(1) - second.mean(1)
    return d.mean(), d.std(ddof=1) / len(d) ** 0.5


def honest(rows, *, luckiest=False):
    runs = {}
    for row in rows:
        if "error" not in row:
            runs.setdefault(row["mixer"], {}).setdefault(row["lr"], []).append(row["accuracy"])
    table = {}
    for mixer, found in runs.items():
        means = {lr: max(p) if luckiest else np.mean(p) for lr, p in found.items()}
        lr = max(means, key=means.get)
        table[mixer] = (lr, means[lr], lr in (min(means), max(means)))
    return table


def times(call, clock, warmup, repeats):
    for _ in range(warmup):
        call()
    found = []
    for _ in range(repeats):
        start = clock()
        call()
        found.append(clock() - start)
    return found


def test_by_hand():
    answer = (0.625, 3200, 0.02 / np.pi**0.5, 1024)
    assert check(f"{CHAPTER}/1", answer)
    assert not check(f"{CHAPTER}/1", (..., ..., ..., ...)).started
    for place, wrong, words in (
        (0, 0.5, "may be the same"),
        (1, 1600, "each of the two"),
        (2, 0.04 / np.pi**0.5, "twice the mean"),
        (3, 256, "one head"),
    ):
        verdict = check(f"{CHAPTER}/1", answer[:place] + (wrong,) + answer[place + 1 :])
        assert not verdict and words in verdict.words


def test_told():
    assert check(f"{CHAPTER}/2", told)
    assert not check(f"{CHAPTER}/2", lambda values: None).started
    nothing = check(f"{CHAPTER}/2", lambda v: max(map(v.count, v)) / len(v))
    assert "told nothing" in nothing.words
    assert "share" in check(f"{CHAPTER}/2", lambda v: told(v) * len(v)).words


def test_difference():
    assert check(f"{CHAPTER}/3", difference)
    assert not check(f"{CHAPTER}/3", lambda a, b: None).started

    def questions(a, b):
        d = (a.astype(float) - b).ravel()
        return d.mean(), d.std(ddof=1) / len(d) ** 0.5

    assert "not independent" in check(f"{CHAPTER}/3", questions).words
    biased = check(
        f"{CHAPTER}/3", lambda a, b: (difference(a, b)[0], (a.mean(1) - b.mean(1)).std() / len(a) ** 0.5)
    )
    assert "n - 1" in biased.words
    assert "First minus second" in check(f"{CHAPTER}/3", lambda a, b: difference(b, a)).words


def test_honest():
    assert check(f"{CHAPTER}/4", honest)
    assert not check(f"{CHAPTER}/4", lambda rows: None).started
    assert "mean over seeds" in check(f"{CHAPTER}/4", lambda rows: honest(rows, luckiest=True)).words
    late = check(f"{CHAPTER}/4", lambda rows: {m: (lr, p, False) for m, (lr, p, _) in honest(rows).items()})
    assert "largest" in late.words


def test_median_time():
    name = f"{CHAPTER}/5"
    assert check(name, lambda call, clock, *, warmup, repeats: np.median(times(call, clock, warmup, repeats)))
    assert not check(name, lambda call, clock, *, warmup, repeats: None).started
    mean = check(name, lambda call, clock, *, warmup, repeats: np.mean(times(call, clock, warmup, repeats)))
    assert "interruption" in mean.words
    fast = check(name, lambda call, clock, *, warmup, repeats: min(times(call, clock, warmup, repeats)))
    assert "fastest" in fast.words
    cold = check(name, lambda call, clock, *, warmup, repeats: np.median(times(call, clock, 0, repeats)))
    assert not cold and "calls" in cold.words


@pytest.mark.parametrize("pairs, values, share", ((1, 7, 1.0), (2, 4, 5 / 8), (3, 1, 1.0), (2, 2, 3 / 4)))
def test_most_frequent_by_hand(pairs, values, share):
    assert most_frequent(pairs, values) == pytest.approx(share)


def test_most_frequent_by_simulation():
    drawn = np.random.default_rng(0).integers(32, size=(20_000, 8))
    counts = (drawn[:, :, None] == drawn[:, None]).sum(2).max(1) / 8
    assert most_frequent(8, 32) == pytest.approx(counts.mean(), abs=4 * counts.std() / 20_000**0.5)


def row(mixer, lr, seed, **more):
    return {"task": "mqar", "mixer": mixer, "lr": lr, "seed": seed, "state": 64, "seconds": 1.0} | more


def test_the_figure_takes_any_record():
    record = {
        "tasks": {"mqar": {"batch": 32, "pairs": 8, "vocab": 64}},
        "rows": [
            row("gla", 1e-3, 0, accuracy=0.5),
            row("gla", 1e-3, 1, accuracy=0.7),
            row("retnet", 1e-2, 0, accuracy=0.4),
            row("retnet", 1e-3, 0, error="out of memory"),
        ],
    }
    state = RateDial(record=record, mine="mamba", task=2).state
    assert (state["rates"], state["rate"], state["task"], state["mine"]) == ([1e-3, 1e-2], 1e-3, 0, "gla")
    gla, retnet = state["tasks"][0]["mixers"]
    # two seeds that differ by more than their questions can explain
    assert gla["scores"][0] == pytest.approx([0.6, 0.1]) and gla["scores"][1] is None
    assert retnet["scores"][0] is None and retnet["scores"][1][1] == pytest.approx((0.24 / 2048) ** 0.5)
    with pytest.raises(ValueError, match="tuned"):
        RateDial(record=record, tuned="somebody")
