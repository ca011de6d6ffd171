"""What a checker says: right, not yet, or not started, in words, for a terminal and for a page."""

import traceback
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

__all__ = ["Verdict", "Wrong", "judge", "must_be_close"]

_PACKAGE = str(Path(__file__).resolve().parents[1])
_NOT_STARTED = "replace the dots by your answer, then run the cell again."


class Wrong(Exception):  # noqa: N818 - it is the verdict's word, not an error of the program
    """Raised by a checker: what input, what came out, what was expected, and a hint."""


class NotStarted(Wrong):
    """Raised where the answer is None or `...`."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check; true when the answer is right.

    Attributes:
        ok: whether the answer is right.
        words: what was verified, or what is wrong.
        started: false while the answer is None or `...`.
    """

    ok: bool
    words: str
    started: bool = True

    @property
    def mark(self) -> str:
        """The verdict in one or two words."""
        return "Right" if self.ok else "Not yet" if self.started else "Not started yet"

    def __bool__(self):
        return self.ok

    def __repr__(self):
        return f"{self.mark}: {self.words}"

    def _repr_html_(self):
        kind = "right" if self.ok else "wrong" if self.started else "open"
        # `code` in the words of a checker becomes code on the page
        parts = escape(self.words).split("`")
        words = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
        return (
            f'<div class="verdict verdict-{kind}" role="status"><strong>{self.mark}:</strong> '
            + words.replace("\n", "<br>")
            + "</div>"
        )


def judge(checker, answer) -> Verdict:
    """Run a checker on an answer: praise, `Wrong`, or the exception of the reader's code, as a Verdict.

    Raises:
        Exception: the checker itself broke, on an answer that did not return None.
    """
    if answer is None or answer is ...:
        return Verdict(False, _NOT_STARTED, started=False)
    try:
        return Verdict(True, checker(answer))
    except NotStarted as wrong:
        return Verdict(False, str(wrong), started=False)
    except Wrong as wrong:
        return Verdict(False, str(wrong))
    except Exception as error:
        words = _explain(error)
        if words is None:
            raise
        return Verdict(False, words)


def must_be_close(got, expected, given, *, hint="", rtol=1e-6, atol=1e-9, what="your function"):
    """Raise `Wrong`, in words, unless an answer has the expected shape and values.

    Args:
        got: what came out: a number, an array or a torch tensor; None and ... are not started yet.
        expected: what should have come out.
        given: the input, in words: "q of shape (1, 8, 2, 4) with T = 8".
        hint: one sentence that helps, without the solution.
        rtol, atol: tolerance: |got - expected| <= atol + rtol * max|expected|, element by element.
        what: what gave the answer, in words.
    """
    if got is None or got is ...:
        raise NotStarted(_NOT_STARTED)
    hint = f" {hint}" if hint else ""
    try:
        got = np.asarray(got.detach().cpu().double() if hasattr(got, "detach") else got, np.float64)
    except (TypeError, ValueError):
        kind = type(got).__name__
        raise Wrong(f"Given {given}, {what} returned a {kind}, expected numbers.{hint}") from None
    expected = np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise Wrong(f"Given {given}, {what} returned shape {got.shape}, expected {expected.shape}.{hint}")
    if got.size == 0:
        return
    if not np.isfinite(got[np.isfinite(expected)]).all():
        raise Wrong(f"Given {given}, {what} returned a number that is infinite or not a number.{hint}")
    with np.errstate(invalid="ignore"):
        off = np.where(got == expected, 0.0, np.abs(got - expected))
    finite = np.abs(expected[np.isfinite(expected)])
    at = np.unravel_index(np.nanargmax(off), off.shape)
    if not off.max() <= atol + rtol * finite.max(initial=0.0):
        spot = f" at index {tuple(map(int, at))}" if got.ndim else ""
        raise Wrong(f"Given {given}, {what} gives {got[at]:.6g}{spot}, expected {expected[at]:.6g}.{hint}")


def _explain(error):
    """The exception of the reader's code in words; None when no line of the reader is in it."""
    frames = traceback.extract_tb(error.__traceback__)
    # the reader's lines are neither the package's nor an installed library's
    theirs = [f for f in frames if not f.filename.startswith(_PACKAGE) and "site-packages" not in f.filename]
    said = f"{type(error).__name__}: {error}"
    if theirs:
        line, number = theirs[-1].line, theirs[-1].lineno
        return f"Your code raised `{said}`, in line {number}" + (f": `{line.strip()}`." if line else ".")
    if "NoneType" in str(error):
        return "Your function returned None: is there a `return` in every branch, with all that is asked for?"
    if isinstance(error, (TypeError, ValueError)):
        return f"Your answer has another form than the exercise asks for: `{said}`."
    return None
