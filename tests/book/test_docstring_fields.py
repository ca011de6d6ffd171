"""Docstring paragraphs "Cost:" and "Source:" become fields of the page."""

from docstring_fields import rewrite


def test_fields_keep_their_continuation_lines():
    lines = ["What it means.", "", "Cost: 2 T FLOPs,", "    no more.", "Source: A 2024.", "", "After."]
    expected = ["What it means.", "", ":Cost: 2 T FLOPs,", "    no more.", ":Source: A 2024.", "", "After."]
    assert rewrite(lines) == expected


def test_other_text_is_left_alone():
    lines = ["The cost: none.", "    x = 1"]
    assert rewrite(lines) == lines
