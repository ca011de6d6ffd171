"""Interactive figure of book/linear/fixed_decay.md: the heads of a layer as clocks of different speed."""

import numpy as np

from effattn_lite.explore.figure import Explorable

SCHEDULES = (
    ("retnet", "RetNet: 1 - 2^(-5-h)"),
    ("printed", "TransNormerLLM as printed, layer 0"),
    ("released", "TransNormerLLM as released, layer 0"),
    ("shared", "one decay for all heads"),
)
"""Ways to set the heads' decays: key -> words."""


class DecayClocks(Explorable):
    """Heads as clocks: drop a fact, let tokens pass, and see what each head keeps of it.

    The sector of a clock is the share left, `gamma ** age`; in the other view it is the fact's signal over
    the noise of all other writes, as a fraction of the best that any single decay reaches at that age.

    Args:
        age: tokens since the fact was written.
        heads: 1, 2, 4 or 8.
        schedule: a key of SCHEDULES.
        gamma: the decay of the schedule "shared".
        noise: start with the view of signal over noise.
        K: key size of a head; the noise of one other write has variance 1 / K.
        M: number of values a fact can have.
    """

    name = "decay_clocks"
    alt = (
        "Heads of one layer as clocks. Each clock's sector shows how much of a fact the head still keeps "
        "after some tokens; curves below show the same against the age of the fact, from 1 to 10,000 tokens."
    )

    def __init__(self, age=100, heads=8, schedule="retnet", gamma=0.97, noise=False, K=64, M=16):
        keys = [key for key, _ in SCHEDULES]
        if schedule not in keys:
            raise ValueError(f"schedule is {schedule!r}, expected one of {keys}")
        ages = np.unique(np.rint(np.geomspace(1, 10_000, 97)).astype(int))
        gammas = [0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999]
        super().__init__(
            age=int(ages[np.abs(ages - age).argmin()]),
            ages=ages,
            heads=heads,
            schedule=schedule,
            schedules=SCHEDULES,
            gamma=min(gammas, key=lambda x: abs(x - gamma)),
            gammas=gammas,
            noise=noise,
            K=K,
            M=M,
        )
