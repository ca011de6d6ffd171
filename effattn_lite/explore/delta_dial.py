"""Interactive figure of book/linear/delta_rule.md: two keys on a dial, and what a write does to both."""

from effattn_lite.explore.figure import Explorable


class DeltaDial(Explorable):
    """Two keys of length 1 in the plane and values of one number: the state is a point of the plane.

    A correcting memory walks along the key towards the line of all states that answer the value; an adding
    one goes the length of the value, wherever it is. Writes are kept, and done again when a key or beta
    changes.

    Args:
        angle: between the keys, degrees, 0 to 180.
        beta: write strength, 0 to 2.
        value_a: what is true of A now, and written by the next write of A.
        value_b: the same of B.
        writes: what was written so far, pairs of "A" or "B" and a value.
        query: direction of a query, degrees from A, -90 to 270.
    """

    name = "delta_dial"
    alt = (
        "A dial with two keys, A and B. The state of a memory is a point; the states that answer right to a "
        "key are a line across it. Writes move the point to the lines; a second plot shows what every query "
        "reads."
    )

    def __init__(
        self,
        angle=60,
        beta=1.0,
        value_a=-1.0,
        value_b=0.5,
        writes=(("B", 0.5), ("A", 1.0), ("A", 1.0), ("A", 1.0), ("A", -1.0)),
        query=30,
    ):
        if not 0 <= angle <= 180:
            raise ValueError(f"angle is {angle}, expected 0 to 180 degrees")
        if not 0 <= beta <= 2:
            raise ValueError(f"beta is {beta}, expected 0 to 2")
        writes = [["AB".index(key), float(value)] for key, value in writes]
        super().__init__(
            angle=angle, beta=beta, value_a=value_a, value_b=value_b, writes=writes, query=query, most=40
        )
