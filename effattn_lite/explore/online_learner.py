"""Interactive figure of book/linear/online_learning.md: one token's problem, and four ways to step."""

import numpy as np

from effattn_lite.explore.figure import Explorable

RULES = ("inner", "gradient", "implicit", "channels")


class OnlineLearner(Explorable):
    """Keys in the plane, values of one number: a state is a point, a token's loss is a valley across its key.

    A hidden map, a point too, answers every key; the memories are told one key and its answer at a time.

    Args:
        rule: whose steps are drawn: "inner" adds, "gradient" goes down the slope where it stands, "implicit"
            goes to the bottom of loss and distance, "channels" is Longhorn, each channel by itself.
        strength: beta, 1/8 to 16.
        length: length of every third key, 1 to 4; the others have length 1.
        keep: share of the state that a token keeps, 0.5 to 1.
        token: tokens told so far, 0 to 24.
        truth: the hidden map, two numbers from -2 to 2.
    """

    name = "online_learner"
    alt = (
        "A plane with the valley of one token's loss and the walk of a memory through a stream of tokens; "
        "beside it a cut along the key: the loss, the distance from the old state and their sum, with the "
        "places where adding, a gradient step, an implicit step and Longhorn land."
    )

    def __init__(self, rule="gradient", strength=1.0, length=2.0, keep=1.0, token=3, truth=(1.2, 0.7)):
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}, expected one of {RULES}")
        if not 0.125 <= strength <= 16:
            raise ValueError(f"strength is {strength}, expected 1/8 to 16")
        if not 1 <= length <= 4:
            raise ValueError(f"length is {length}, expected 1 to 4")
        if not 0.5 <= keep <= 1:
            raise ValueError(f"keep is {keep}, expected 0.5 to 1")
        angles = np.random.default_rng(3).uniform(0, np.pi, size=24)
        super().__init__(
            rule=rule,
            strength=strength,
            length=length,
            keep=keep,
            token=token,
            truth=[float(x) for x in truth],
            angles=angles.round(3),
        )
