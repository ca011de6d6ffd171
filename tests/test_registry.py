"""The registry is consistent with itself."""

import pytest

from effattn_lite import CHAPTERS, METHODS, notation, registry
from effattn_lite.registry import FAMILIES, ROOMS, find, names

ROWS = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)


@ROWS
def test_a_row_uses_known_words(row):
    assert row.name.isidentifier() and row.name == row.name.lower()
    assert row.family in FAMILIES and set(row.rooms) <= set(ROOMS)
    assert row.chapter in CHAPTERS
    axes = {axis for spec in (*row.inputs.values(), *row.states) for axis in spec.split()}
    assert axes <= set(notation.AXES)


@ROWS
def test_limits_name_methods(row):
    assert set(row.reduces_to) <= set(METHODS) - {row.name}


@pytest.mark.parametrize("room", ROOMS[:4])
def test_a_standing_room_is_described(room):
    for name in names(room):
        row = find(name)
        assert row.inputs and row.forms and row.cite, name
        assert row.layer or room != "layer", name
        assert row.engine or room != "kernel", name


def test_aliases_lead_to_one_row():
    words = [word for row in METHODS.values() for word in (row.name, *row.aliases)]
    assert len(words) == len(set(words))
    assert find("retention") is find("retnet")


def test_an_unknown_name_is_met_with_near_ones():
    with pytest.raises(ValueError, match="no method is called 'retnett'.*retnet"):
        registry.find("retnett")


def test_chapters_need_chapters():
    for chapter in CHAPTERS.values():
        assert set(chapter.needs) <= set(CHAPTERS)
