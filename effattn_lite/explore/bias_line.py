"""Interactive figure of book/linear/elementwise.md: which position biases two sums can carry."""

from effattn_lite.explore.figure import Explorable

SHAPES = (
    ("hump", "a hump at lag 5", (0, -2, -1.5, -0.5, 1, 2, 1, -0.5, -1.5, -2, -2.5, -3)),
    ("flat", "flat (AFT-simple)", (0,) * 12),
    ("line", "a line and a bonus (RWKV-4)", (1.5, *(-0.4 * d for d in range(11)))),
    ("window", "a window of four", (2, 2, 2, 2, *(-2,) * 8)),
)
"""Biases to begin with: key, words, one bias a lag, from 0."""

KEYS = (
    ("equal", "all equal", (0,) * 12),
    ("loud", "one loud token, the third", (0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
    ("mixed", "mixed", (1, -1, 2, 0, -2, 1.5, 0, 2.5, -1, 0.5, 1, -0.5)),
)
"""Keys of the twelve tokens: key, words, numbers."""


class BiasLine(Explorable):
    """Drag the bias of every lag of one channel; see the exponents move as the reader moves on.

    Two sums are carried with the factor e^(b(2) - b(1)) a token, and the current token enters with its own
    bias b(0): what they answer stands beside the average that the biases ask for.

    Args:
        shape: a key of SHAPES.
        text: a key of KEYS, the tokens' keys.
        reader: the token that reads, 2 to 12.
    """

    name = "bias_line"
    alt = (
        "A position bias for each of twelve lags, to drag. Below, the exponents that a reader sees, beside "
        "those its predecessor saw, and every token's share: outlined what the biases ask for, filled what "
        "two running sums can carry. They agree where the biases lie on a line."
    )

    def __init__(self, shape="hump", text="mixed", reader=9):
        shapes, all_keys = ({one[0]: one[2] for one in table} for table in (SHAPES, KEYS))
        if shape not in shapes:
            raise ValueError(f"shape is {shape!r}, expected one of {list(shapes)}")
        if text not in all_keys:
            raise ValueError(f"text is {text!r}, expected one of {list(all_keys)}")
        if not 2 <= reader <= 12:
            raise ValueError(f"reader is {reader}, expected 2 to 12")
        super().__init__(shape=shape, shapes=SHAPES, bias=shapes[shape], text=text, texts=KEYS, reader=reader)
