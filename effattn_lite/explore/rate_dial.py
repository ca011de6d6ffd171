"""Interactive figure of book/foundations/how_to_compare.md: a ranking, and the learning rates behind it."""

import math

import numpy as np

from effattn_lite import data
from effattn_lite.explore.figure import Explorable
from effattn_lite.registry import find

TASKS = (
    ("mqar", "accuracy", "recall (MQAR)"),
    ("parity", "accuracy at 40", "parity of 40 bits"),
    ("parity", "accuracy at 128", "parity of 128 bits"),
)
POLICIES = ("nobody", "mine", "everybody")
BATCHES = 8
"""Test batches of every run, as `train.evaluate` draws them."""


class RateDial(Explorable):
    """All mixers of a recorded run in the order of their accuracy, for a choice of learning rates.

    Args:
        task: number of the task: 0 recall, 1 parity of 40 bits, 2 parity of 128 bits, of those recorded.
        rate: learning rate of all who are not tuned; the nearest recorded one is taken.
        tuned: who gets the best of the recorded rates: "nobody", "mine" or "everybody".
        mine: the mixer that is picked out, by its name in the registry.
        record: what `data.results("linear_tasks")` returns; that by default.
    """

    name = "rate_dial"
    alt = (
        "A ranking of sequence mixers by their accuracy on a recorded task, one bar each with its error. A "
        "slider sets the learning rate of all; one mixer, or every one, can be given its best rate, and the "
        "bars change places."
    )

    def __init__(self, task=0, rate=0.003, tuned="nobody", mine="gla", record=None):
        if tuned not in POLICIES:
            raise ValueError(f"tuned is {tuned!r}, expected one of {POLICIES}")
        record = record or data.results("linear_tasks")
        rows = [row for row in record["rows"] if "error" not in row]
        rates = sorted({row["lr"] for row in rows})
        tasks = [_task(record, rows, rates, *known) for known in TASKS]
        tasks = [one for one in tasks if len(one["mixers"]) > 1]
        names = sorted({m["name"] for one in tasks for m in one["mixers"]})
        super().__init__(
            task=min(task, len(tasks) - 1),
            rate=min(rates, key=lambda lr: abs(math.log(lr / rate))),
            tuned=tuned,
            mine=mine if mine in names else names[0],
            rates=rates,
            tasks=tasks,
            names=[[n, _short(n)] for n in names],
        )


def most_frequent(pairs, values):
    """Share of right answers of whoever names the value that stands in a text most often.

    With N values drawn from M, this is the mean of the largest count, divided by N.

    Args:
        pairs: N.
        values: M.
    """
    within = []
    for most in range(pairs):
        # N! times the coefficient of x^N in (1 + x + ... + x^c / c!)^M: texts whose counts are at most c
        counts = np.array([1 / math.factorial(i) for i in range(most + 1)])
        power = np.ones(1)
        for _ in range(values):
            power = np.convolve(power, counts)[: pairs + 1]
        texts = power[pairs] if len(power) > pairs else 0.0
        within.append(math.factorial(pairs) * texts / values**pairs)
    return float(sum(1 - share for share in within) / pairs)


def _task(record, rows, rates, task, key, label):
    known = record["tasks"].get(task, {})
    rows = [row for row in rows if row["task"] == task and key in row]
    questions = BATCHES * known.get("batch", 0) * known.get("pairs", 1)
    floor = most_frequent(known["pairs"], known["vocab"] // 2) if task == "mqar" else 0.5
    mixers = []
    for name in sorted({row["mixer"] for row in rows}):
        own = [row for row in rows if row["mixer"] == name]
        runs = [[row[key] for row in own if row["lr"] == lr] for lr in rates]
        scores = [[float(np.mean(found)), _error(found, questions)] if found else None for found in runs]
        row = find(name)
        mixers.append(
            {"name": name, "title": _short(name), "family": row.family, "state": own[0]["state"]}
            | {"scores": scores}
        )
    return {"label": label, "floor": floor, "questions": questions, "mixers": mixers}


def _short(name):
    """The title, or its initials where the title is longer than a label may be."""
    title = find(name).title.split(" (")[0].split(" / ")[0]
    return title if len(title) <= 19 else name.upper()


def _error(found, questions):
    """Standard error of a mean over seeds: of the questions, or of the seeds where they differ more."""
    p, n = np.mean(found), len(found)
    asked = math.sqrt(p * (1 - p) / (questions * n))
    return max(asked, float(np.std(found, ddof=1) / math.sqrt(n))) if n > 1 else asked
