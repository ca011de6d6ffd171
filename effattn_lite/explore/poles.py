"""Interactive figure of book/linear/state_space.md: one mode of a state space model, and steps by token."""

from effattn_lite.explore.figure import Explorable

RULES = (
    ("exact", "exact: e^(Δ A)"),
    ("bilinear", "bilinear: mean of both ends"),
    ("euler", "Euler: 1 + Δ A"),
)
"""Ways to turn a rate into a factor a token: key -> words."""

TEXT = ("Anna", ",", "um", ",", "well", ",", "lives", "you", "know", "in", "Lyon", ".")
"""Tokens of the lower half; the state is told of the first one."""

FILLERS = (1, 2, 3, 4, 5, 7, 8)
"""Tokens of TEXT that say nothing."""


class Poles(Explorable):
    """A rate in the complex plane, the factor it becomes, and what is left of a token after others.

    Args:
        fade: minus the real part of the rate, 0 to 2 a unit of time.
        ring: its imaginary part, 0 to 6, radians a unit of time.
        step: Delta, the time between two tokens.
        rule: a key of RULES.
        skip: begin with the steps of the fillers set to 0.
    """

    name = "poles"
    alt = (
        "A rate of decay and oscillation as a point in the complex plane, the factor a token that it becomes "
        "beside the unit circle, and the weight of a token 0 to 60 tokens later. Below, twelve tokens whose "
        "steps can be set to 0 or to 8 times the usual one, and what is left of the first after each."
    )

    def __init__(self, fade=0.4, ring=3.0, step=0.2, rule="exact", skip=False):
        keys = [key for key, _ in RULES]
        if rule not in keys:
            raise ValueError(f"rule is {rule!r}, expected one of {keys}")
        if not (0 <= fade <= 2 and 0 <= ring <= 6):
            raise ValueError(f"the rate is -{fade} + {ring}i, expected fade in [0, 2] and ring in [0, 6]")
        steps = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2]
        super().__init__(
            fade=float(fade),
            ring=float(ring),
            step=min(steps, key=lambda x: abs(x - step)),
            steps=steps,
            rule=rule,
            rules=RULES,
            text=TEXT,
            fillers=FILLERS,
            # factor of each token's step: 1 usual, 0 skip, 8 wipe
            turns=[0 if skip and i in FILLERS else 1 for i in range(len(TEXT))],
        )
