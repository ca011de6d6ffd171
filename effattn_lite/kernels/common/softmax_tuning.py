"""Tiles of a softmax over keys: one table for every engine that walks over keys, then over queries."""

from effattn_lite.kernels.common import launch

# capability -> kernel -> width of the wider head -> (BM, BN, warps, stages); the first candidate is used
# 90's order was measured on an H100 at T 2,048 to 32,768; the others are by registers and shared memory
HALF = {
    launch.INTERPRETER: {
        "fwd": {256: [(32, 16, 4, 1)]},
        "dq": {256: [(32, 16, 4, 1)]},
        "dkdv": {256: [(16, 32, 4, 1)]},
    },
    75: {
        "fwd": {64: [(64, 32, 4, 1)], 128: [(32, 32, 4, 1)], 256: [(32, 16, 4, 1)]},
        "dq": {64: [(32, 32, 4, 1)], 128: [(32, 16, 4, 1)], 256: [(16, 16, 4, 1)]},
        "dkdv": {64: [(32, 32, 4, 1)], 128: [(16, 32, 4, 1)], 256: [(16, 16, 4, 1)]},
    },
    80: {
        "fwd": {64: [(128, 64, 4, 3)], 128: [(128, 64, 8, 3), (128, 32, 4, 3)], 256: [(64, 32, 4, 2)]},
        "dq": {64: [(128, 64, 8, 2)], 128: [(64, 64, 4, 2), (128, 32, 8, 2)], 256: [(64, 32, 8, 1)]},
        "dkdv": {64: [(64, 128, 8, 2)], 128: [(32, 128, 8, 2)], 256: [(32, 64, 8, 1)]},
    },
    86: {
        "fwd": {64: [(128, 64, 4, 2)], 128: [(128, 32, 4, 2)], 256: [(64, 32, 8, 1)]},
        "dq": {64: [(64, 64, 4, 2)], 128: [(64, 32, 4, 2)], 256: [(32, 32, 4, 1)]},
        "dkdv": {64: [(64, 64, 4, 2)], 128: [(32, 64, 4, 2)], 256: [(16, 32, 4, 1)]},
    },
    90: {
        "fwd": {
            64: [(128, 128, 8, 3), (128, 64, 4, 3)],
            128: [(128, 64, 8, 3), (128, 128, 8, 2)],
            256: [(128, 64, 8, 2)],
        },
        "dq": {
            64: [(64, 64, 4, 3), (128, 64, 8, 3)],
            128: [(128, 64, 8, 2), (64, 64, 4, 2)],
            256: [(128, 32, 8, 2), (64, 32, 8, 2)],
        },
        "dkdv": {
            64: [(64, 64, 4, 3), (64, 128, 8, 3)],
            128: [(32, 64, 4, 2), (32, 128, 8, 2)],
            256: [(32, 64, 8, 2)],
        },
    },
}
# Blackwell: on data-centre GPUs the gradient needs more registers, consumer ones are as those of Ampere
HALF[100] = HALF[90] | {
    "dkdv": {
        64: [(64, 128, 8, 3), (32, 128, 8, 3)],
        128: [(64, 64, 8, 2), (32, 64, 8, 2)],
        256: [(32, 64, 8, 1), (32, 32, 8, 2)],
    }
}
HALF[120] = HALF[86]
FLOAT = {
    launch.INTERPRETER: HALF[launch.INTERPRETER],
    # 64 KiB do not hold the gradient's tiles of 256 columns
    75: {
        "fwd": {64: [(32, 32, 4, 1)], 128: [(32, 16, 4, 1)]},
        "dq": {64: [(32, 32, 4, 1)], 128: [(16, 16, 4, 1)]},
        "dkdv": {64: [(32, 32, 4, 1)], 128: [(16, 16, 4, 1)]},
    },
    80: {
        "fwd": {64: [(64, 64, 8, 1)], 128: [(64, 32, 8, 1)], 256: [(32, 16, 8, 1)]},
        "dq": {64: [(64, 32, 8, 1)], 128: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
        "dkdv": {64: [(32, 64, 8, 1)], 128: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
    },
}


def candidates(kernel: str, capability: int, width: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """Tuning of "fwd", "dq" or "dkdv" for a GPU and head width: (BM, BN, warps, stages), best first."""
    by_width = launch.choose(HALF if itemsize == 2 else FLOAT, capability)[kernel]
    return by_width[min(w for w in by_width if w >= width)]
