"""Interactive figure of book/foundations/three_forms.md: the chunk length as a dial, and four scans."""

from effattn_lite.explore.figure import Explorable

LENGTHS = [64, 4096, 65536, 1048576]
SCANS = (
    ("sequential", "one after the other"),
    ("hillis", "Hillis and Steele: doubling"),
    ("blelloch", "Blelloch: up and down a tree"),
    ("chunks", "chunks of 4"),
)
"""Ways to combine sixteen items: key -> words."""


class ThreeForms(Explorable):
    """The triangle of scores cut into chunks, and what a chunk length costs; below it scans, round by round.

    Args:
        tokens: T, one of LENGTHS.
        chunk: C, a power of two up to T; 1 is the recurrent form, T the parallel one.
        size: K = V, 32, 64 or 128.
        price: FLOPs that would take as long as one step waits, a power of ten.
        scan: a key of SCANS.
        round: rounds of the scan done already.
    """

    name = "three_forms"
    alt = (
        "The triangle of scores cut into chunks along its diagonal; slide the chunk length from one token to "
        "all of them, and work, steps and stored states trade places. Below it a scan of sixteen items."
    )

    def __init__(self, tokens=4096, chunk=64, size=64, price=1_000_000, scan="hillis", round=0):
        if scan not in dict(SCANS):
            raise ValueError(f"scan is {scan!r}, expected one of {list(dict(SCANS))}")
        super().__init__(
            tokens=tokens,
            lengths=LENGTHS,
            chunk=min(chunk, tokens),
            size=size,
            price=price,
            scan=scan,
            scans=SCANS,
            round=round,
        )
