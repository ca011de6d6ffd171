"""Interactive figure of book/linear/multi_pass.md: ten words, four drawers, a query that looks inside."""

import numpy as np

from effattn_lite.explore.figure import Explorable

NAMES = ("Ada", "Bo", "Cy", "Di", "Eve")

TOKENS = ((0, 1), (1, 2), (2, 3), (0, 4), (3, 5), (1, 6), (0, 7), (4, 8), (2, 9), (3, 10))
"""The text: who, and which number is now theirs."""

DRAWERS = 4

BY_NAME = tuple(name % DRAWERS for name, _ in TOKENS)
IN_ROTATION = tuple(t % DRAWERS for t in range(len(TOKENS)))


class Drawers(Explorable):
    """Ten words are laid into four drawers; a softmax over the drawers answers what number a name has.

    Args:
        rule: "abc", a drawer is the weighted mean of all words; "gsa", it keeps what its gate says.
        place: the drawer of each word, 0 to 3; default by name, Eve with Ada.
        force: nats by which a word prefers its drawer to the others.
        length: of the query; a drawer scores length times the share that words of the name have in it.
        ask: the name, 0 to 4.
    """

    name = "drawers"
    alt = (
        "Ten words, each a name and its new number, above four drawers; a dot that can be dragged says which "
        "drawer a word goes into. Bars show what every drawer holds after the text, how a query for one name "
        "spreads over the drawers, and the answer that it reads."
    )

    def __init__(self, rule="abc", place=BY_NAME, force=8.0, length=20.0, ask=0):
        if rule not in ("abc", "gsa"):
            raise ValueError(f"rule is {rule!r}, expected 'abc' or 'gsa'")
        place = [int(m) for m in place]
        if len(place) != len(TOKENS) or not all(0 <= m < DRAWERS for m in place):
            raise ValueError(f"place is {place}, expected {len(TOKENS)} drawers from 0 to {DRAWERS - 1}")
        super().__init__(
            rule=rule, place=place, force=force, length=length, ask=ask, tokens=TOKENS, names=NAMES
        )


def read(rule, place, force=8.0, length=20.0):
    """Shares of the ten words in the drawers, [T, M], and in the answers, [names, T].

    Args:
        rule, place, force, length: as in the figure.
    """
    logit = np.where(np.arange(DRAWERS) == np.array(place)[:, None], force, 0.0)
    P = np.zeros((len(TOKENS), DRAWERS))
    for t, row in enumerate(logit):
        if rule == "abc":
            weights = np.exp(logit[: t + 1])
            P[: t + 1] = weights / weights.sum(0)
        else:
            write = 1 / (1 + np.exp(force / 2 - row))
            P *= 1 - write
            P[t] = write
    keys = np.eye(len(NAMES))[[name for name, _ in TOKENS]]  # [T, names]
    x = length * keys.T @ P
    p = np.exp(x - x.max(1, keepdims=True))
    return P, p / p.sum(1, keepdims=True) @ P.T


def right(rule, place, **options):
    """How many of the five names are answered by their last number with more than half of the weight."""
    answers = read(rule, place, **options)[1]
    last = {name: t for t, (name, _) in enumerate(TOKENS)}
    return sum(bool(answers[name, t] > 0.5) for name, t in last.items())
