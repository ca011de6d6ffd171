"""SmolLM2-135M in plain torch: tokenizer, weights, and a forward pass under any streaming pattern.

The whole sequence goes through at once, and gives what a rolling cache gives token by token: keys in the
window meet the query at their true distance, sinks at the distance they have inside the cache.
"""

import re
from dataclasses import dataclass

import gguf
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pattern:
    """What query t may read: the first `sinks` tokens, and the window that ends at t.

    Attributes:
        sinks: s, first tokens kept for ever.
        window: W tokens, the query's own included; None keeps everything (dense).
        block: the window is the last W / block blocks of this size, the query's own included.
        reindex: sinks sit at their place in the cache; False leaves them at their place in the text.
        silent: sinks outside the window keep their weight, but their values read as zero.
    """

    sinks: int = 0
    window: int | None = None
    block: int = 1
    reindex: bool = True
    silent: bool = False

    def start(self, t):
        """First key of query t's window."""
        if self.window is None:
            return torch.zeros_like(t)
        return ((t // self.block - self.window // self.block + 1) * self.block).clamp(min=0)

    def place(self, t):
        """Query t's place in the cache: the keys kept so far, without its own."""
        start = self.start(t)
        return torch.where((start <= self.sinks) | (not self.reindex), t, self.sinks + t - start)


@dataclass(frozen=True)
class Model:
    """Weights by GGUF name, and the sizes that the forward pass needs."""

    weights: dict
    layers: int
    heads: int
    kv_heads: int
    theta: float
    eps: float


def load(path, device="cpu"):
    """The model and its tokenizer from a GGUF file, in float32."""
    meta, arrays = gguf.read(path)
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    weights = {name: torch.from_numpy(x.copy()).to(device) for name, x in arrays.items()}
    for name, w in weights.items():
        if "attn_q" in name or "attn_k" in name:
            # the file interleaves the two halves of each rotary pair; rotate() wants (i, i + K/2)
            n = heads if "attn_q" in name else kv_heads
            weights[name] = w.view(n, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape).contiguous()
    eps = meta["llama.attention.layer_norm_rms_epsilon"]
    model = Model(weights, meta["llama.block_count"], heads, kv_heads, meta["llama.rope.freq_base"], eps)
    return model, Tokenizer(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"])


class Tokenizer:
    """Byte-level BPE with single digits, as SmolLM2's."""

    PIECE = re.compile(r"'(?:[sdmt]|ll|re|ve)| ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?=\d)|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges):
        self.tokens = tokens
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        other = [b for b in range(256) if b not in plain]
        self.letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(other)}
        self.byte = {c: b for b, c in self.letter.items()}

    def encode(self, text):
        """Text to a list of token ids."""
        pieces = self.PIECE.findall(text)
        ids = {piece: [self.ids[part] for part in self.merge(piece)] for piece in set(pieces)}
        return [i for piece in pieces for i in ids[piece]]

    def merge(self, piece):
        """Join the pair of lowest rank until none is left."""
        parts = [self.letter[b] for b in piece.encode()]
        while len(parts) > 1:
            pairs = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:], strict=False)]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[i] == len(self.rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def decode(self, ids):
        """Token ids to text."""
        return bytes(self.byte[c] for i in ids for c in self.tokens[i]).decode(errors="replace")


def plain_text(markdown):
    """A play without its Markdown marks: names, lines and stage directions remain."""
    return re.sub(r"[*_]|^#+ |  $", "", markdown, flags=re.MULTILINE).replace("\n\n", "\n").strip()


def forward(model, ids, pattern=None, *, chunk=512, probe=1, taps=()):
    """Hidden states after the last norm, [T, D]; what the heads looked at; and tapped q, k, v.

    Args:
        model: from `load`.
        ids: [T] token ids.
        pattern: what a query may read; default dense.
        chunk: queries whose scores are held at once.
        probe: the mass returned is that on the first `probe` tokens, averaged over the later half of queries.
        taps: layers whose q, k, v before rotation are returned.

    Returns:
        x [T, D]; mass [L, H]; {layer: (q [T, H, K], k [T, HKV, K], v [T, HKV, K])}.
    """
    w, pattern, tapped, mass = model.weights, pattern or Pattern(), {}, []
    x = w["token_embd.weight"][ids]
    for i in range(model.layers):
        p = f"blk.{i}."
        h = rms_norm(x, w[p + "attn_norm.weight"], model.eps)
        q = (h @ w[p + "attn_q.weight"].T).unflatten(1, (model.heads, -1))
        k = (h @ w[p + "attn_k.weight"].T).unflatten(1, (model.kv_heads, -1))
        v = (h @ w[p + "attn_v.weight"].T).unflatten(1, (model.kv_heads, -1))
        if i in taps:
            tapped[i] = (q, k, v)
        o, m = attend(q, k, v, pattern, model.theta, chunk, probe)
        mass.append(m)
        x = x + o.flatten(1) @ w[p + "attn_output.weight"].T
        h = rms_norm(x, w[p + "ffn_norm.weight"], model.eps)
        up = F.silu(h @ w[p + "ffn_gate.weight"].T) * (h @ w[p + "ffn_up.weight"].T)
        x = x + up @ w[p + "ffn_down.weight"].T
    return rms_norm(x, w["output_norm.weight"], model.eps), torch.stack(mass), tapped


def attend(q, k, v, pattern, theta, chunk, probe):
    """Attention under a pattern, one softmax over sinks and window; o [T, H, K] and the probed mass [H]."""
    T, H, K = q.shape
    HKV, s = k.shape[1], pattern.sinks
    t = torch.arange(T, device=q.device)
    start, k = pattern.start(t), rotate(k, t, theta).transpose(0, 1)  # [HKV, T, K]
    v = v.transpose(0, 1)
    near = rotate(q, t, theta).view(T, HKV, -1, K).permute(1, 2, 0, 3)  # [HKV, G, T, K]
    far = rotate(q, pattern.place(t), theta).view(T, HKV, -1, K).permute(1, 2, 0, 3)
    out, mass = torch.empty_like(near), q.new_zeros(HKV, H // HKV)
    for i in range(0, T, chunk):
        rows, low, high = t[i : i + chunk, None], int(start[i]), min(i + chunk, T)
        keys = torch.cat((t[:s], t[low:high]))  # [s + n]
        b = start[i:high, None]
        a = torch.cat(
            (far[:, :, i:high] @ k[:, None, :s].mT, near[:, :, i:high] @ k[:, None, low:high].mT), 3
        )
        # a sink that is inside the window counts there
        seen = torch.cat((t[:s] < b, (b <= t[low:high]) & (t[low:high] <= rows)), -1)  # [C, s + n]
        a = (a * K**-0.5).masked_fill_(~seen, -torch.inf).softmax(-1)
        out[:, :, i:high] = a @ torch.cat((v[:, None, :s] * (not pattern.silent), v[:, None, low:high]), 2)
        late = rows[:, 0] >= T // 2
        mass += a[..., late, :][..., keys < probe].sum((-1, -2))
    return out.permute(2, 0, 1, 3).reshape(T, H, K), (mass / (T - T // 2)).flatten()


def rotate(x, positions, theta):
    """Rotary positions on [T, H, K], pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    omega = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = positions[:, None, None].double() * omega
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rms_norm(x, weight, eps):
    """Root-mean-square norm over the last axis."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def token_losses(model, ids, x, chunk=2048):
    """-log p(token t | tokens before t) for t = 1 .. T - 1, in nats, [T - 1]."""
    head = model.weights["token_embd.weight"].T
    pairs = zip(x[:-1].split(chunk), ids[1:].split(chunk), strict=True)
    return torch.cat([F.cross_entropy(a @ head, target, reduction="none") for a, target in pairs])
