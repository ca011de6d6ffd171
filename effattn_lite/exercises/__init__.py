"""Checkers of the book's exercises: property tests that say in words what is wrong.

`check("foundations/online_softmax/3", answer)` runs `exercise_3` of `foundations/online_softmax.py` in this
folder on the reader's answer. NumPy alone at import.
"""

import re
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files

from effattn_lite.exercises.verdict import Verdict, Wrong, judge

__all__ = ["Verdict", "Wrong", "check", "names"]

_HERE = files("effattn_lite.exercises")


def check(name: str, answer) -> Verdict:
    """Whether an answer is right, and what is wrong with it if not.

    Args:
        name: part, chapter and number, "foundations/online_softmax/3".
        answer: what the exercise asks for, most often a function; None and ... are not started yet.

    Returns:
        A Verdict: true when right; shown in words in a terminal, a notebook and the page.

    Raises:
        ValueError: there is no such exercise; the message names near ones.
    """
    if name not in names():
        near = get_close_matches(name, names(), n=3, cutoff=0.3)
        raise ValueError(f"no exercise is called {name!r}; near names: {', '.join(near) or 'none'}")
    chapter, number = name.rsplit("/", 1)
    module = import_module(f"effattn_lite.exercises.{chapter.replace('/', '.')}")
    return judge(getattr(module, f"exercise_{number}"), answer)


def names() -> list[str]:
    """Names of all exercises that have a checker, by chapter and number."""
    found = []
    for part in sorted((folder for folder in _HERE.iterdir() if folder.is_dir()), key=lambda f: f.name):
        for file in sorted((f for f in part.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
            numbers = re.findall(r"^def exercise_(\d+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
            found += [f"{part.name}/{file.name[:-3]}/{n}" for n in sorted(numbers, key=int)]
    return found
