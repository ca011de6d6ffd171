"""A grid of programs makes a matrix product tile by tile: masks, strides, bytes, and what fits on a chip."""

from effattn_lite.explore.figure import Explorable


class LaunchGrid(Explorable):
    """The launch of a tiled product C = A B: who owns which tile, what each load touches, what it costs.

    Args:
        BM, BN, BK: rows, columns and depth of a tile: 16, 32, 64 or 128.
        shape: (M, N, K) of the product, one of `SHAPES`.
        program: number of the program looked at, rows of tiles first.
        step: how many tiles of depth it has taken in.
        masked: loads and stores leave out lanes beyond the matrices.
        dtype: "float16" or "float32".
        stages: how many tiles of depth are under way at once, 1 to 5.
    """

    name = "launch_grid"
    alt = (
        "A matrix product is cut into tiles, one program a tile. The program that you choose walks along the "
        "depth; its lanes beyond the edge are masked, or, with the mask off, read what lies there. Below "
        "stands the shared memory that its tiles take, beside what a T4, an A100 and an H100 have."
    )
    SHAPES = ((100, 150, 72), (128, 192, 128), (65, 129, 33))

    def __init__(
        self,
        BM=64,
        BN=64,
        BK=32,
        *,
        shape=SHAPES[0],
        program=5,
        step=2,
        masked=True,
        dtype="float16",
        stages=3,
    ):
        state = dict(BM=BM, BN=BN, BK=BK, shape=self.SHAPES.index(tuple(shape)), program=program, step=step)
        state |= dict(masked=masked, dtype=dtype, stages=stages, shapes=self.SHAPES)
        super().__init__(**state)
