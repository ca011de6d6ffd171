"""What a checker says to a right, a wrong, an unfinished and a failing answer."""

import numpy as np
import pytest

from effattn_lite import exercises
from effattn_lite.exercises.verdict import Verdict, Wrong, judge, must_be_close


def double(answer):
    must_be_close(answer(3.0), 6.0, "`x = 3`", hint="Twice as much.")
    return "it doubles."


def test_right():
    verdict = judge(double, lambda x: 2 * x)
    assert verdict and repr(verdict) == "Right: it doubles."
    assert 'class="verdict verdict-right" role="status"' in verdict._repr_html_()


def test_wrong_says_input_output_and_expected():
    verdict = judge(double, lambda x: x)
    assert not verdict
    assert repr(verdict) == "Not yet: Given `x = 3`, your function gives 3, expected 6. Twice as much."
    assert "<code>x = 3</code>" in verdict._repr_html_()


@pytest.mark.parametrize("answer", [None, ..., lambda x: None, lambda x: ...])
def test_not_started(answer):
    verdict = judge(double, answer)
    assert not verdict and not verdict.started and repr(verdict).startswith("Not started yet: ")


def test_an_exception_names_the_readers_line():
    def broken(x):
        return x / 0.0 if isinstance(x, str) else [][0]

    words = judge(double, broken).words
    assert "IndexError: list index out of range" in words and "[][0]" in words


def test_an_exception_inside_numpy_names_the_readers_line():
    words = judge(double, lambda x: np.ones(3) @ np.ones(4)).words
    assert "ValueError" in words and "np.ones(3) @ np.ones(4)" in words


def test_unpacking_none_is_said_in_words():
    # the checker's own line fails, as it does in a file of the package
    checker = eval(compile("lambda answer: (lambda o, S: 'x')(*answer(1))", exercises.__file__, "eval"))
    assert "returned None" in judge(checker, lambda x: None).words


def test_a_broken_checker_is_no_verdict():
    checker = eval(compile("lambda answer: {}['lost']", exercises.__file__, "eval"))
    with pytest.raises(KeyError):
        judge(checker, lambda x: x)


@pytest.mark.parametrize(
    "got, expected, words",
    [
        ("text", 1.0, "returned a str"),
        (np.ones(3), np.ones(4), r"shape \(3,\), expected \(4,\)"),
        ([1.0, np.nan], [1.0, 2.0], "not a number"),
        ([1.0, 2.0], [1.0, 2.5], r"gives 2 at index \(1,\), expected 2.5"),
        (-np.inf, 0.0, "infinite"),
        (0.0, -np.inf, "expected -inf"),
    ],
)
def test_must_be_close_says_what_differs(got, expected, words):
    with pytest.raises(Wrong, match=words):
        must_be_close(got, expected, "this")


def test_must_be_close_lets_right_answers_through():
    torch = pytest.importorskip("torch")
    must_be_close(1 + 1e-9, 1.0, "this")
    must_be_close(torch.ones(2), [1, 1], "this")
    must_be_close([-np.inf, 1], [-np.inf, 1], "this")
    must_be_close(np.zeros((0, 3)), np.zeros((0, 3)), "this")


def test_html_is_escaped():
    assert "&lt;b&gt;" in Verdict(False, "<b>")._repr_html_()


def test_an_unknown_exercise_names_near_ones():
    known = exercises.names()
    if not known:
        pytest.skip("no exercise has a checker yet")
    with pytest.raises(ValueError, match=f"near names: {known[0][:-1]}"):
        exercises.check(known[0].rsplit("/", 1)[0] + "/99", 1)


@pytest.mark.parametrize("name", exercises.names())
def test_every_exercise_takes_an_unfinished_answer(name):
    for answer in (None, ..., lambda *args, **kwargs: None):
        verdict = exercises.check(name, answer)
        assert not verdict and verdict.words
