"""Interactive figure of book/linear/gated_delta.md: facts that are written, replaced and wiped."""

from effattn_lite.explore.figure import Explorable

ORDERS = ("first", "survey", "last")


class FactBoard(Explorable):
    """Four facts, four memories, and the eigenvalues of what a token does to the state.

    Keys have length 1 and four axes, values are single numbers. A write replaces one fact, a wipe sets all to
    0; what was told is kept, and done again when a control changes.

    Args:
        fact: the fact to write next, "A" to "D".
        value: its new value.
        beta: write strength, 0 to 2.
        gate: what a write keeps of the state, alpha, 0 to 1; a wipe keeps 2 %.
        overlap: product of any two keys, 0 to 0.8.
        order: of the gated memory: "first" decays, then corrects; "survey" corrects by what was there before
            the decay; "last" decays what it has just written too.
        tokens: what was told so far, pairs of "A" to "D" and a value, or "wipe".
    """

    name = "fact_board"
    alt = (
        "A board of four facts that can be written, replaced and wiped. Four memories, adding, decaying, "
        "correcting and doing both, answer beside the true values; a circle shows the eigenvalues of the "
        "last token and of the last two."
    )

    def __init__(
        self,
        fact="A",
        value=0.8,
        beta=1.0,
        gate=1.0,
        overlap=0.0,
        order="first",
        tokens=(("A", 1.0), ("B", -0.8), ("C", 0.5), ("D", -1.0), ("A", -0.6)),
    ):
        if not 0 <= beta <= 2:
            raise ValueError(f"beta is {beta}, expected 0 to 2")
        if not 0 <= gate <= 1:
            raise ValueError(f"gate is {gate}, expected 0 to 1")
        if not 0 <= overlap <= 0.8:
            raise ValueError(f"overlap is {overlap}, expected 0 to 0.8")
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}, expected one of {ORDERS}")
        told = [[-1, 0.0] if one == "wipe" else ["ABCD".index(one[0]), float(one[1])] for one in tokens]
        super().__init__(
            fact="ABCD".index(fact),
            value=value,
            beta=beta,
            gate=gate,
            overlap=overlap,
            order=order,
            tokens=told,
            most=40,
        )
