"""Interactive figure of book/linear/kernel_view.md: one query, eight keys, two kernels side by side."""

import numpy as np

from effattn_lite.explore.figure import Explorable

MAPS = (
    ("elu1", "elu + 1"),
    ("relu", "relu"),
    ("taylor1", "1 + x"),
    ("taylor2", "1 + x + x²/2"),
    ("taylor4", "up to x⁴/24"),
)
"""Kernels beside the softmax: key -> words; x is the score."""


class KernelView(Explorable):
    """A query in the plane: softmax weights of eight keys of one length, beside a feature map's.

    Tinted is every query that the same key would win; a dashed ring is a key that no query lets win.

    Args:
        query: (x, y) of the query, each between -4 and 4.
        kernel: a key of MAPS.
        length: length of all keys, one of 0.5, 1, 1.5, 2, 3, 4.
    """

    name = "kernel_view"
    alt = (
        "Two planes with the same query and the same eight keys on a circle. The area of a key's disc is its "
        "weight: under softmax in the left plane, under a feature map in the right one. Bars below compare "
        "the weights, and a read-out says over how many keys each of the two spreads."
    )

    def __init__(self, query=(-1.4, -1.4), kernel="elu1", length=2):
        if kernel not in dict(MAPS):
            raise ValueError(f"kernel is {kernel!r}, expected one of {list(dict(MAPS))}")
        angle = np.pi / 4 * np.arange(8)
        super().__init__(
            x=float(query[0]),
            y=float(query[1]),
            kernel=kernel,
            kernels=MAPS,
            length=length,
            lengths=[0.5, 1, 1.5, 2, 3, 4],
            circle=np.round(np.stack((np.cos(angle), np.sin(angle)), axis=1), 9),
        )
