"""Dump queries, keys and values of three SmolLM2 layers; writes effattn_lite/data/smollm2_qkv.npz.

    python tools/smollm2_arrays.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --text hamlet.md \
        --out effattn_lite/data/smollm2_qkv.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from smollm2 import forward, load, plain_text

KEPT = {7: (0, 2), 10: (0, 1), 18: (0, 2)}
"""Layer -> key/value heads; each comes with the three query heads that share it."""


def arrays(model, tokenizer, text, tokens):
    """q [L, T, H, K], k and v [L, T, HKV, K] before rotation, in float16, and what names them."""
    ids = tokenizer.encode(text)[:tokens]
    with torch.inference_mode():
        _, _, taps = forward(model, torch.tensor(ids), taps=KEPT)
    group = model.heads // model.kv_heads
    heads = {layer: [group * n + i for n in kv for i in range(group)] for layer, kv in KEPT.items()}

    def stack(part, kept):
        return torch.stack([taps[layer][part][:, list(kept[layer])] for layer in KEPT]).half().numpy()

    return {
        "q": stack(0, heads),
        "k": stack(1, KEPT),
        "v": stack(2, KEPT),
        "layers": np.array(list(KEPT)),
        "heads": np.array(list(heads.values())),
        "kv_heads": np.array(list(KEPT.values())),
        "rope_theta": np.float64(model.theta),
        "tokens": np.array([tokenizer.decode([i]) for i in ids]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    model, tokenizer = load(args.weights)
    text = plain_text(Path(args.text).read_text())
    np.savez_compressed(args.out, **arrays(model, tokenizer, text, args.tokens))


if __name__ == "__main__":
    main()
