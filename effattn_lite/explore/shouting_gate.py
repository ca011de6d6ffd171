"""Interactive figure of book/linear/xlstm.md: input gates that shout, and the maximum that follows them."""

from effattn_lite.explore.figure import Explorable

SHAPES = (
    ("shout", "one shout", (0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 0, 0)),
    ("voice", "a raised voice", (0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0)),
    ("climb", "every token louder", tuple(range(0, 96, 8))),
    ("whisper", "all whisper", (-20,) * 12),
    ("early", "a shout at the start", (12, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)),
)
"""Gates to begin with: key, words, one input gate a token."""

FORMATS = ("float16", "bfloat16", "float32")
"""Formats that the memory can be kept in."""


class ShoutingGate(Explorable):
    """Drag the input gates of twelve tokens; see the stabiliser follow and what a memory answers.

    The memory keeps one cell a token and the sum of all weights, so that its answer is every token's share.
    Each product and sum is rounded to the format.

    Args:
        shape: a key of SHAPES.
        keep: share that a step keeps, sigmoid of the forget gate: 0.5, 0.8, 0.9, 0.99 or 1.
        format: one of FORMATS.
        stabilised: keep everything times e^-m.
    """

    name = "shouting_gate"
    alt = (
        "Twelve input gates to drag, and the stabiliser m, which follows the largest. Bars below compare "
        "each token's true share in the average with what a memory in a chosen float format answers."
    )

    def __init__(self, shape="shout", keep=1.0, format="float16", stabilised=False):
        shapes = {key: gates for key, _, gates in SHAPES}
        if shape not in shapes:
            raise ValueError(f"shape is {shape!r}, expected one of {list(shapes)}")
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {list(FORMATS)}")
        super().__init__(
            shape=shape,
            shapes=SHAPES,
            gates=shapes[shape],
            keep=min((0.5, 0.8, 0.9, 0.99, 1.0), key=lambda x: abs(x - keep)),
            format=format,
            stabilised=stabilised,
        )
