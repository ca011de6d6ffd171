"""The arrays of a real model are those that their description promises."""

import hashlib
import re
from importlib.resources import files

import numpy as np

from effattn_lite import data

HERE = files("effattn_lite.data")


def test_small_and_described():
    source = (HERE / "SOURCE.md").read_text(encoding="utf-8")
    arrays = [f for f in HERE.iterdir() if f.name.endswith(".npz")]
    assert sum(len(f.read_bytes()) for f in arrays) <= 4e6
    for file in arrays:
        assert f"## {file.name}" in source
        assert hashlib.sha256(file.read_bytes()).hexdigest() in re.findall(r"[0-9a-f]{64}", source)


def weights(d, layer, head):
    """Attention weights [T, T] of one head, with rotary positions."""
    T, half = d["q"].shape[1], d["q"].shape[3] // 2
    angle = np.arange(T)[:, None] * float(d["rope_theta"]) ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)

    def rotated(x):
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate((z.real, z.imag), 1)

    a = (
        rotated(d["q"][layer, :, head].astype(float))
        @ rotated(d["k"][layer, :, head // 3].astype(float)).T
        / 8
    )
    a = np.where(np.tri(T, dtype=bool), a, -np.inf)
    a = np.exp(a - a.max(1, keepdims=True))
    return a / a.sum(1, keepdims=True)


def test_smollm2_qkv():
    d = data.load("smollm2_qkv")
    assert d["q"].shape == (3, 1024, 6, 64) and d["k"].shape == d["v"].shape == (3, 1024, 2, 64)
    assert d["q"].dtype == np.float16 and float(d["rope_theta"]) == 1e5
    assert d["layers"].tolist() == [7, 10, 18] and len(d["tokens"]) == 1024
    assert "".join(d["tokens"]).startswith("Hamlet\nACT I\nSCENE I. Elsinore.")
    assert all(np.isfinite(d[name]).all() for name in "qkv")


def test_the_maps_are_what_they_are_chosen_for():
    d = data.load("smollm2_qkv")
    first = [[weights(d, layer, head)[512:, 0].mean() for head in range(6)] for layer in range(3)]
    # layer 18 reads its first token, up to all the time; layers 7 and 10 hardly
    assert max(first[2]) > 0.99 and min(first[2]) > 0.25
    assert max(first[0]) < 0.1 and max(first[1]) < 0.02
    # layer 7 reads four words "the" instead
    the = [18, 272, 593, 656]
    assert set(d["tokens"][the]) == {" the"}
    assert weights(d, 0, 0)[700:, the].sum(1).mean() > 0.5
