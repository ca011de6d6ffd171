"""The tasks ask what they say they ask: each is solved here by its definition."""

import numpy as np
import pytest

from effattn_lite.tasks import copying, induction, mqar, state_tracking
from effattn_lite.tasks.ask import NOTHING, accuracy

DRAWS = {
    "mqar": mqar.draw,
    "parity": state_tracking.parity,
    "permutations": state_tracking.permutations,
    "copying": copying.draw,
    "induction": induction.draw,
}


def sample(name, **sizes):
    return DRAWS[name](np.random.default_rng(0), batch=200, **sizes)


@pytest.mark.parametrize("name", DRAWS)
def test_same_seed_same_sample(name):
    (a, b), (c, d) = sample(name), sample(name)
    assert np.array_equal(a, c) and np.array_equal(b, d)
    assert a.shape == b.shape and a.dtype == np.int64 and (b != NOTHING).any()


def test_mqar_is_a_dictionary():
    tokens, targets = sample("mqar", length=128, pairs=16, vocab=64)
    for text, asked in zip(tokens, targets, strict=True):
        pairs = dict(zip(text[0:32:2], text[1:32:2], strict=True))
        assert len(pairs) == 16 and min(pairs) >= 1 and max(pairs) < 32 <= min(pairs.values())
        (at,) = np.nonzero(asked != NOTHING)
        assert set(text[at]) == set(pairs) and (at >= 32).all()
        assert all(asked[t] == pairs[text[t]] for t in at)
        assert (text[32:][asked[32:] == NOTHING] == 0).all()


def test_mqar_asks_early_more_often():
    _, targets = sample("mqar", length=256, pairs=4)
    asked = (targets != NOTHING).mean(axis=0)[8::2]
    # weight 1 / j: the first place against the hundredth
    assert asked[0] > 0.5 > 0.1 > asked[90:110].mean() > 0


@pytest.mark.parametrize("sizes, match", ((dict(length=60), "60.*64"), (dict(vocab=20), "20.*34")))
def test_mqar_must_fit(sizes, match):
    with pytest.raises(ValueError, match=match):
        sample("mqar", **sizes)


def test_parity():
    tokens, targets = sample("parity", length=9)
    assert (targets[:, -1] == tokens.sum(axis=1) % 2).all() and set(np.unique(tokens)) == {0, 1}


def test_permutations_are_a_group():
    """Targets follow from the one before by a table that is a Latin square, and S2 is parity."""
    tokens, targets = sample("permutations", length=50)
    table = {}
    for text, product in zip(tokens, targets, strict=True):
        assert product[0] == text[0]
        for before, token, after in zip(product, text[1:], product[1:], strict=False):
            assert table.setdefault((before, token), after) == after
    assert len(table) == 36
    square = np.array([[table[a, b] for b in range(6)] for a in range(6)])
    assert all(len(set(line)) == 6 for line in (*square, *square.T))
    assert not np.array_equal(square, square.T)  # S3 does not commute
    tokens, targets = sample("permutations", of=2)
    assert np.array_equal(targets, tokens.cumsum(axis=1) % 2)


@pytest.mark.parametrize("scattered", (True, False))
def test_copying(scattered):
    tokens, targets = sample("copying", length=64, data=8, scattered=scattered)
    for text, asked in zip(tokens, targets, strict=True):
        said = text[:56][text[:56] >= 2]
        assert np.array_equal(said, asked[56:]) and (text[56:] == 1).all() and (asked[:56] == NOTHING).all()
    places = np.unique(np.nonzero(tokens[:, :56] >= 2)[1])
    assert len(places) == (56 if scattered else 8)
    with pytest.raises(ValueError, match="15.*16"):
        sample("copying", length=15)


def test_induction():
    tokens, targets = sample("induction", length=20)
    for text, asked in zip(tokens, targets, strict=True):
        first, last = np.nonzero(text == 0)[0]
        assert last == 19 and asked[19] == text[first + 1] and first <= 17 and asked[19] > 0
    with pytest.raises(ValueError, match="2.*3"):
        sample("induction", length=2)


def test_accuracy_counts_what_is_asked():
    targets = np.array([[NOTHING, 3, 4], [5, NOTHING, NOTHING]])
    assert accuracy(np.array([[3, 3, 3], [5, 5, 5]]), targets) == 2 / 3
    assert np.isnan(accuracy(targets[:, 1:][1:], targets[:, 1:][1:]))
