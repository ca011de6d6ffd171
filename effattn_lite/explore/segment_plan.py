"""Interactive figure of book/linear/chunkwise_kernels.md: segments, programs and bytes."""

from effattn_lite import data
from effattn_lite.explore.figure import Explorable

PROCESSORS = 132
"""Multiprocessors of an H100 SXM, the card of the records."""


class SegmentPlan(Explorable):
    """Two launches of linear attention with one decay a head: grid, bytes, products, a time from them.

    The time is a range. Low: every launch fetches what it needs from memory once, and products hide behind
    that. High: every tile that a program asks for comes from memory, and nothing hides. Both are divided by
    the share of processors that have a program.

    Args:
        tokens: length of the text, a power of two between 2,048 and 131,072.
        heads: number of heads.
        size: K = V, 64, 128 or 256.
        segments: pieces that the text is cut into.
        chunk: tokens of a chunk, 16 to 128.
        columns: columns of V that a program of the read owns, 32, 64 or 128.
    """

    name = "segment_plan"
    alt = (
        "A text is cut into segments. Above, the processors of a GPU, filled by the programs of the launch; "
        "in the middle, what is moved; below, the predicted time against the number of segments, between a "
        "low and a high bound, with the floor and, where there is one, the recorded time."
    )

    def __init__(self, tokens=32768, heads=16, size=128, segments=16, chunk=64, columns=64):
        run = data.results("retnet")
        if tokens not in (2**n for n in range(11, 18)):
            raise ValueError(f"tokens is {tokens}, expected a power of two between 2048 and 131072")
        recorded = [
            [row["impl"], row["shape"]["T"], row["ms"]]
            for row in run["rows"]
            if row["pass"] == "forward" and (row["impl"] == "triton" or row["impl"].startswith("fla"))
        ]
        super().__init__(
            tokens=tokens,
            heads=heads,
            size=size,
            segments=segments,
            chunk=chunk,
            columns=columns,
            processors=PROCESSORS,
            copy=run["ceilings"]["copy_tb_s"],
            product=run["ceilings"]["product_tflop_s"],
            recorded=recorded,
            date=run["date"],
        )
