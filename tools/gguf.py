"""Read a GGUF file: its metadata and its tensors, as float32 NumPy arrays.

Only what SmolLM2's file holds: float32, float16, Q4_1 and Q8_0.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read(path):
    """The metadata and the tensors of a file: two dictionaries, tensors as [out, in]."""
    data = memoryview(Path(path).read_bytes())
    magic, version, n_tensors, n_pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version != 3:
        raise ValueError(f"{path} begins with {magic!r} version {version}, expected b'GGUF' version 3")
    cursor = Cursor(data, 24)
    meta = {}
    for _ in range(n_pairs):
        key = cursor.string()
        meta[key] = cursor.value(cursor.scalar("I"))
    entries = [cursor.tensor_entry() for _ in range(n_tensors)]
    align = meta.get("general.alignment", 32)
    base = -(-cursor.at // align) * align
    tensors = {name: unpack(data[base + at :], kind, shape) for name, shape, kind, at in entries}
    return meta, tensors


class Cursor:
    """A place in the file; each method reads one thing and moves behind it."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def scalar(self, code):
        """One little-endian number."""
        (x,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return x

    def string(self):
        """A length and that many bytes of UTF-8."""
        n = self.scalar("Q")
        self.at += n
        return str(self.data[self.at - n : self.at], "utf-8")

    def value(self, kind):
        """A metadata value of the given kind."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(n)]
        return self.scalar(SCALARS[kind])

    def tensor_entry(self):
        """Name, shape, kind and offset; the file lists the fastest axis first."""
        name, dims = self.string(), self.scalar("I")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")


def unpack(data, kind, shape):
    """Numbers of one tensor; a quantised block is 32 values along the fastest axis."""
    n = int(np.prod(shape))
    if kind == 0:
        return np.frombuffer(data, "<f4", n).reshape(shape)
    if kind == 1:
        return np.frombuffer(data, "<f2", n).astype(np.float32).reshape(shape)
    if kind == 3:  # Q4_1: x = d * nibble + m; low nibbles are values 0..15, high ones 16..31
        block = np.frombuffer(data, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), n // 32)
        nibbles = np.concatenate((block["q"] & 15, block["q"] >> 4), axis=1).astype(np.float32)
        return (nibbles * block["d"][:, None] + block["m"][:, None].astype(np.float32)).reshape(shape)
    if kind == 8:  # Q8_0: x = d * byte
        block = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", 32)]), n // 32)
        return (block["q"].astype(np.float32) * block["d"][:, None]).reshape(shape)
    raise ValueError(f"tensor kind {kind} is not read here; there are 0 (F32), 1 (F16), 3 (Q4_1), 8 (Q8_0)")
