"""Interactive figure of book/linear/gates.md: a line of tokens, two rows of a memory, a gate for each."""

import numpy as np

from effattn_lite.explore.figure import Explorable

TOKENS = (
    # words, row that is written or asked, value that is written or expected
    ("name", "Ada", "write", 0, 0),
    ("code", "4812", "write", 1, 1),
    ("hello", "", "pass", 0, 0),
    ("code?", "4812", "ask", 1, 1),
    ("forget", "code", "pass", 0, 0),
    ("code", "7730", "write", 1, 2),
    ("code?", "7730", "ask", 1, 2),
    ("name?", "Ada", "ask", 0, 0),
)
"""The text: two words for the picture, what the token does, its row (0 name, 1 code), its value."""

VALUES = ("Ada", "4812", "7730")

BEST_DECAY = 0.915
"""The gate, the same at every token, with the least squared error of the three answers."""


class ForgetGates(Explorable):
    """Eight tokens over a memory of two rows; drag the gate under a token and watch the answers.

    The score is the sum of the squared errors of three answers: 0 when every question is answered by the
    right value at weight 1 and nothing else.

    Args:
        name_gates: gates of the row of the name, one a token, from 0, wipe, to 1, keep; default the best
            decay that is the same at every token.
        code_gates: gates of the row of the code; default the same.
        tied: one gate a token for both rows, that of the name.
        leftover: a row takes in the value at one minus its gate, as HGRN2 does, and every row does.
    """

    name = "forget_gates"
    alt = (
        "A line of eight tokens: the name is Ada, the code is 4812, a question, forget the code, the code is "
        "7730, two questions. Below it two rows of a memory, each with a gate under every token to drag "
        "between 0, wipe, and 1, keep, and bars for what the row holds. A read-out scores the answers."
    )

    def __init__(self, name_gates=None, code_gates=None, tied=True, leftover=False):
        gates = {"name_gates": name_gates, "code_gates": code_gates}
        for key, row in gates.items():
            row = [BEST_DECAY] * len(TOKENS) if row is None else [float(x) for x in row]
            if len(row) != len(TOKENS) or not all(0 <= x <= 1 for x in row):
                raise ValueError(f"{key} is {row}, expected {len(TOKENS)} numbers from 0 to 1")
            gates[key] = row
        if tied:
            gates["code_gates"] = list(gates["name_gates"])
        super().__init__(**gates, tied=tied, leftover=leftover, tokens=TOKENS, values=VALUES)


def answers(name, code):
    """What the three questions read, [3, 3] by question and value, for gates of the two rows.

    Args:
        name, code: gates of the rows, one a token.
    """
    S, read = np.zeros((2, len(VALUES))), []
    for t, (_, _, kind, row, value) in enumerate(TOKENS):
        S = np.array([[name[t]], [code[t]]]) * S
        if kind == "write":
            S[row, value] += 1
        if kind == "ask":
            read.append(S[row].copy())
    return np.array(read)
