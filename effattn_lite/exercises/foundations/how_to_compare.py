"""Checkers of the exercises in book/foundations/how_to_compare.md. NumPy alone at import."""

import itertools
import math

import numpy as np

from effattn_lite.exercises.verdict import NotStarted, Wrong, must_be_close

_DOTS = "replace the dots by your answer, then run the cell again."


def exercise_1(answer):
    """By hand: a floor, a number of questions, the bias of the better of two, a state.

    Args:
        answer: (score, questions, bias, numbers in the state).
    """
    if isinstance(answer, tuple) and any(x is ... for x in answer):
        raise NotStarted(_DOTS)
    try:
        score, asked, bias, state = (float(x) for x in answer)
    except (TypeError, ValueError):
        raise Wrong("give four numbers: (score, asked, bias, state)") from None
    if abs(score - 0.625) > 1e-4:
        hint = "; two values may be the same, and then every answer is right" if score in (0.5, 0.25) else ""
        raise Wrong(f"score: you gave {score:g}{hint}; with which probability are both values the same?")
    if abs(asked - 3200) > 1:
        hint = {1600: "; each of the two has an error", 800: "; two standard errors, not one"}.get(asked, "")
        raise Wrong(f"asked: you gave {asked:g}{hint}; the variance of the difference is 2 p (1 - p) / N")
    if abs(bias - 0.02 / math.sqrt(math.pi)) > 2e-4:
        hint = "; that is twice the mean" if abs(bias - 0.04 / math.sqrt(math.pi)) < 2e-4 else ""
        raise Wrong(f"bias: you gave {bias:g}{hint}; half the mean distance of two results")
    if state != 1024:
        hint = (
            "; that is one head" if state == 256 else "; four heads share the width" if state > 1024 else ""
        )
        raise Wrong(f"state: you gave {state:g}{hint}; H heads of K x V numbers, K = D / H")
    return "5/8, 3,200 questions each, 0.011 for nothing, and 1,024 numbers."


def exercise_2(told):
    """Proof and code: the score of a reader of the list who is told the right value after each answer.

    Args:
        told: function (values) -> expected share of right answers, the order of the questions random.
    """
    cases = ((7,), (1, 2), (3, 3), (1, 1, 2), (5, 5, 5, 5), (1, 2, 3, 4), (1, 1, 2, 2, 3), (4, 4, 4, 2, 2, 9))
    for values in cases:
        got, want = told(list(values)), _told(values)
        hint = "After each answer one member of the list is gone."
        if np.ndim(got) == 0 and got not in (None, ...):
            most = max(values.count(v) for v in values) / len(values)
            if len(set(values)) > 1 and abs(float(got) - most) < 1e-9:
                hint = "That is the score of a reader who is told nothing."
            elif abs(float(got) - want * len(values)) < 1e-9 and len(values) > 1:
                hint = "Give the share, not the number."
        must_be_close(got, want, f"the values {list(values)}", hint=hint, what="`told`", rtol=1e-9)
    return f"{len(cases)} lists agree with a count over all orders of the questions."


def _told(values):
    """The mean over all orders, question by question."""
    right = orders = 0
    for order in itertools.permutations(values):
        left, orders = list(order), orders + 1
        for value in order:
            most = max(left.count(v) for v in left)
            # among equally frequent values any choice has the same chance
            first = min(v for v in left if left.count(v) == most)
            right += first == value
            left.remove(value)
    return right / orders / len(values)


def exercise_3(difference):
    """Code: a paired difference of accuracies, and its standard error with texts as units.

    Args:
        difference: function (first, second), boolean [texts, questions] -> (difference, standard error).
    """
    rng = np.random.default_rng(3)
    cases = {
        "2 texts of 1 question": (2, 1, 0.0),
        "40 texts of 8 questions that share their luck": (40, 8, 0.9),
        "300 texts of 4 questions": (300, 4, 0.4),
    }
    for what, (texts, asked, shared) in cases.items():
        hard = rng.normal(size=(texts, 1))
        noise = rng.normal(size=(2, texts, asked))
        first, second = (
            shared * hard + (1 - shared) * x + s > 0 for x, s in zip(noise, (0.2, -0.1), strict=True)
        )
        if texts == 2:
            first, second = np.array([[True], [False]]), np.array([[False], [False]])
        got = difference(first.copy(), second.copy())
        if got is None or got is ...:
            raise NotStarted(_DOTS)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong("`difference` must return two numbers: the difference and its standard error")
        d = first.mean(1) - second.mean(1)
        must_be_close(got[0], d.mean(), what, hint="First minus second.", what="the difference")
        must_be_close(
            got[1],
            d.std(ddof=1) / texts**0.5,
            what,
            what="the error",
            hint=_error_hint(got[1], first, second),
        )
    return "Three cases agree: what both find hard has cancelled, and questions of one text count once."


def _error_hint(got, first, second):
    texts, asked = first.shape
    flat = first.astype(float).ravel() - second.ravel()
    parts = [x.var(ddof=1) / x.size for x in (first.astype(float), second.astype(float))]
    d = first.mean(1) - second.mean(1)
    with np.errstate(all="ignore"):
        if np.isclose(got, d.std() / texts**0.5):
            return "Divide the squares by n - 1, as the mean was estimated too."
        if np.isclose(got, flat.std(ddof=1) / flat.size**0.5):
            return "These are questions; the questions of one text are not independent."
        if np.isclose(got, sum(parts) ** 0.5, rtol=0.01):
            return "That is the error of two tests on different questions."
        if np.isclose(got, d.std(ddof=1)):
            return "That is the spread of one text; a mean of n has less."
    return "One difference for each text, then the spread of these, divided by the root of their number."


def exercise_4(honest):
    """Code: the best mean over seeds of every mixer, and whether it lies at an end of its sweep.

    Args:
        honest: function (rows) -> {mixer: (lr, mean, edge)}.
    """
    rows = [_row("a", lr, s, p) for lr, found in ((1e-3, (0.2, 0.3)), (3e-3, (0.7, 0.8)), (1e-2, (0.1, 0.9)))
            for s, p in enumerate(found)]  # fmt: skip
    rows += [_row("b", 1e-2, 0, 0.6), _row("b", 3e-3, 0, 0.4), _row("b", 1e-3, 0, 0.5)]
    rows += [_row("c", 3e-3, 0, 0.33)]
    rows += [
        _row("d", 1e-3, 0, 0.2),
        _row("d", 3e-3, 0, 0.9),
        _row("d", 3e-3, 1, 0.5),
        _row("d", 1e-2, 0, None),
    ]
    rows += [_row("e", 1e-2, 0, None)]
    want = {"a": (3e-3, 0.75, False), "b": (1e-2, 0.6, True), "c": (3e-3, 0.33, True), "d": (3e-3, 0.7, True)}
    words = {
        "a": "its seeds at 0.01 scored 0.1 and 0.9: take the mean over seeds before the best rate",
        "b": "its rates stand in no order, and 0.01 is its largest",
        "c": "one rate alone is an edge, at both ends",
        "d": "its run at 0.01 failed, so that 0.003 is the largest rate with a result",
    }
    got = honest([dict(row) for row in rows])
    if got is None or got is ...:
        raise NotStarted(_DOTS)
    if not isinstance(got, dict):
        raise Wrong(f"`honest` returned a {type(got).__name__}, expected a dict: mixer -> (lr, mean, edge)")
    if "e" in got:
        raise Wrong("mixer e is in your table, and none of its runs succeeded")
    for mixer, (lr, mean, edge) in want.items():
        if mixer not in got:
            raise Wrong(f"mixer {mixer} is missing")
        if not isinstance(got[mixer], tuple) or len(got[mixer]) != 3:
            raise Wrong(f"mixer {mixer}: expected three things, (lr, mean, edge)")
        rate, value, end = got[mixer]
        if rate != lr or abs(value - mean) > 1e-9 or bool(end) != edge:
            given = (rate, float(value), bool(end))
            raise Wrong(f"mixer {mixer}: you gave {given}, expected {(lr, mean, edge)}; {words[mixer]}")
    return "Four mixers agree; the one with the luckiest single run does not win by it."


def _row(mixer, lr, seed, accuracy):
    return {"mixer": mixer, "lr": lr, "seed": seed} | (
        {"error": "out of memory"} if accuracy is None else {"accuracy": accuracy}
    )


class _Bench:
    """Calls that are slow at first and now and then interrupted, and a clock that costs a little itself."""

    def __init__(self, seed, slow):
        rng = np.random.default_rng(seed)
        self.costs = [1e-3 + 1e-5 * x for x in rng.random(4000)]
        for i in range(slow):
            self.costs[i] = 0.5 / (i + 1)
        for i in rng.choice(np.arange(slow, 4000), 800, replace=False):
            self.costs[i] += 0.02
        self.now, self.calls, self.reads = 0.0, 0, 0

    def call(self):
        self.now += self.costs[self.calls]
        self.calls += 1

    def clock(self):
        self.now += 1e-6
        self.reads += 1
        return self.now


def exercise_5(median_time):
    """Code: the median time of a call, after a warm-up.

    Args:
        median_time: function (call, clock, warmup=, repeats=) -> seconds.
    """
    for seed, (warmup, repeats) in enumerate(((5, 101), (0, 3), (20, 50))):
        bench = _Bench(seed, slow=warmup)
        got, what = (
            median_time(bench.call, bench.clock, warmup=warmup, repeats=repeats),
            f"{warmup} and {repeats} calls",
        )
        if got is None or got is ...:
            raise NotStarted(_DOTS)
        if bench.calls != warmup + repeats:
            raise Wrong(f"{what}: you made {bench.calls} calls, expected {warmup + repeats}")
        counted = np.array(bench.costs[warmup : warmup + repeats]) + 1e-6
        hint = "Two readings of the clock around each call, and the middle of what they give."
        if np.ndim(got) == 0 and abs(float(got) - counted.mean()) < 1e-4 < abs(
            counted.mean() - np.median(counted)
        ):
            hint = "That is the mean: every interruption is in it."
        elif np.ndim(got) == 0 and abs(float(got) - counted.min()) < 1e-9:
            hint = "That is the fastest call, not the usual one."
        must_be_close(got, np.median(counted), what, hint=hint, what="`median_time`", rtol=2e-3)
    return "Three benches agree, though one call in five was interrupted for twenty times its length."
