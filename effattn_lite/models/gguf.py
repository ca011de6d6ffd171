"""Read a GGUF file: its metadata, its tensors, and the Llama or the tokenizer that they are."""

import mmap
import struct
from pathlib import Path

import numpy as np
import torch

from effattn_lite.models import llama
from effattn_lite.models.config import Config, Rope
from effattn_lite.models.convert import load as load_weights
from effattn_lite.models.lm import LanguageModel
from effattn_lite.models.tokenizer import Tokenizer

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCKS = {
    0: ("F32", 1, "<f4"),
    1: ("F16", 1, "<f2"),
    3: ("Q4_1", 32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    8: ("Q8_0", 32, [("d", "<f2"), ("q", "i1", 32)]),
}
"""Kind of a tensor -> its name, how many values a block has, and what a block consists of."""
CONTROL = 3
"""Type of tokens that no text is split into."""


def load(path: str | Path) -> LanguageModel:
    """The model of a GGUF file, in float32 and evaluation mode.

    Args:
        path: of a file whose architecture is "llama": SmolLM2 and its kind.

    Raises:
        ValueError: another format or architecture, a kind of tensor that is not read here, a tensor too many
            or too few.
    """
    metadata, arrays = read(path)
    config = configuration(metadata, tie="output.weight" not in arrays)
    heads = config.mixers["A"].options["heads"], config.mixers["A"].options["kv_heads"]
    theirs = {name: torch.from_numpy(x) for name, x in arrays.items()}
    for name, w in theirs.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # rotary pairs lie side by side in the file; ours are (i, i + K / 2)
            n = heads["attn_k" in name]
            theirs[name] = w.view(n, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    return load_weights(LanguageModel(config), llama.gguf_weights(config), theirs).eval()


def tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file; its tensors are not read.

    Raises:
        ValueError: another format, or a tokenizer that is not SmolLM2's.
    """
    metadata, _, _ = _head(_open(path), path)
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path} has a tokenizer of kind {kind}, expected ('gpt2', 'smollm')")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    return Tokenizer(tokens, metadata["tokenizer.ggml.merges"], control=control)


def configuration(metadata: dict[str, object], *, tie: bool) -> Config:
    """Our configuration of a file's metadata.

    Args:
        metadata: of the file.
        tie: the file has no head of its own.

    Raises:
        ValueError: another architecture, or stretched rotary positions.
    """
    kind = metadata.get("general.architecture")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if kind != "llama" or scaling != "none":
        raise ValueError(f"architecture {kind!r}, rope scaling {scaling!r}: expected 'llama' and 'none'")
    get = {name.removeprefix("llama."): x for name, x in metadata.items()}.get
    heads, width = get("attention.head_count"), get("embedding_length")
    return llama.config(
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        width=width,
        depth=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", width // heads),
        hidden=get("feed_forward_length"),
        turns=Rope(get("rope.freq_base", 10_000.0), dims=get("rope.dimension_count")),
        eps=get("attention.layer_norm_rms_epsilon"),
        tie=tie,
    )


def read(path: str | Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The metadata and the tensors of a file, [out, in] float32.

    Raises:
        ValueError: not GGUF version 3, or a kind of tensor that is not read here.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    data = _open(path)
    metadata, entries, start = _head(data, path)
    return metadata, {name: unpack(data, start + at, kind, shape) for name, shape, kind, at in entries}


def unpack(data, at: int, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of one tensor, float32; a quantised block is 32 values along the fastest axis.

    .. math:: x = d\\,q + m \\ \\text{(Q4\\_1, 4 bits)}, \\qquad x = d\\,q \\ \\text{(Q8\\_0, signed)}

    Args:
        data: bytes.
        at: where the tensor begins.
        kind: a key of BLOCKS.
        shape: of the tensor.

    Raises:
        ValueError: another kind.
    """
    if kind not in BLOCKS:
        known = ", ".join(f"{number} ({name})" for number, (name, _, _) in BLOCKS.items())
        raise ValueError(f"a tensor of kind {kind}, expected one of {known}")
    name, size, layout = BLOCKS[kind]
    block = np.frombuffer(data, np.dtype(layout), int(np.prod(shape)) // size, at)
    if size == 1:
        return block.astype(np.float32).reshape(shape)
    d, q = block["d"][:, None].astype(np.float32), block["q"]
    if name == "Q8_0":
        return (d * q).reshape(shape)
    # low halves of the bytes are values 0 to 15, high ones 16 to 31
    q = np.concatenate((q & 15, q >> 4), axis=1)
    return (d * q + block["m"][:, None].astype(np.float32)).reshape(shape)


def _open(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _head(data, path):
    """Metadata; (name, shape, kind, offset) of each tensor; where tensors begin."""
    magic, version = struct.unpack_from("<4sI", data) if len(data) >= 24 else (data[:4], None)
    if magic != b"GGUF" or version != 3:
        raise ValueError(f"{path} begins with {magic!r}, version {version}, expected b'GGUF', version 3")
    cursor = _Cursor(data, 8)
    tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(pairs)}
    entries = [cursor.entry() for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    return metadata, entries, -(-cursor.at // align) * align


class _Cursor:
    """A place in the file; each method reads one thing and moves behind it."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def scalar(self, code):
        (x,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return x

    def string(self):
        n = self.scalar("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(n)]
        return self.scalar(SCALARS[kind])

    def entry(self):
        # the file lists the fastest axis first
        name, axes = self.string(), self.scalar("I")
        shape = tuple(self.scalar("Q") for _ in range(axes))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")
