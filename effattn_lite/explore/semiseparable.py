"""Interactive figure of book/linear/mamba2.md: blocks of a semiseparable mask, and the five steps of SSD."""

import numpy as np

from effattn_lite.explore.figure import Explorable

CONTENTS = (
    ("mask", "the mask L"),
    ("two", "L times scores, K = 2"),
    ("four", "L times scores, K = 4"),
    ("softmax", "softmax, K = 4"),
)
"""What the matrix holds: key -> words."""

VIEWS = (("block", "one block"), ("steps", "the five steps"))
"""What the figure does with the matrix: key -> words."""


class Semiseparable(Explorable):
    """The matrix of one head over 16 tokens: cut a block and see its rank, or compute it in five steps.

    Args:
        content: a key of CONTENTS.
        view: a key of VIEWS.
        row: first row of the block, a reader, counted from 0.
        column: last column of the block, a writer, counted from 0; at most `row`, or the block is not below
            the diagonal.
        chunk: tokens in a chunk: 2, 4 or 8.
        seed: of the gates, queries and keys.
    """

    name = "semiseparable"
    alt = (
        "The lower triangular matrix of one head over 16 tokens. A block cut from it below the diagonal is "
        "a column of numbers times a row of numbers; bars show its singular values. In the other view "
        "the matrix is cut into chunks and five steps fill it."
    )

    def __init__(self, content="mask", view="block", row=7, column=7, chunk=4, seed=3):
        keys = [key for key, _ in CONTENTS]
        if content not in keys:
            raise ValueError(f"content is {content!r}, expected one of {keys}")
        if view not in ("block", "steps"):
            raise ValueError(f"view is {view!r}, expected 'block' or 'steps'")
        rng = np.random.default_rng(seed)
        gates = np.round(np.exp(-np.exp(rng.uniform(np.log(0.03), np.log(0.5), size=16))), 2)
        q, k = (np.round(rng.normal(size=(16, 4)), 2) for _ in range(2))
        super().__init__(
            content=content,
            contents=CONTENTS,
            view=view,
            views=VIEWS,
            row=row,
            column=column,
            chunk=chunk,
            step=0,
            token=6,
            gates=gates,
            q=q,
            k=k,
        )
