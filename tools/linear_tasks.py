"""Which linear mixers recall, which track a state? Writes book/_results/linear_tasks.json.

    python tools/linear_tasks.py --jobs 28
    python tools/linear_tasks.py --mixers softmax_attention deltanet --tasks mqar --rates 1e-2 --seeds 1

Every mixer is its package layer with its own defaults, in the same reader (`effattn_lite.train.Reader`): two
layers, for recall a short convolution before each mixer that has none of its own, for parity an MLP behind
it. The learning rate is swept, since the order of the mixers depends on it.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from effattn_lite import __version__, registry  # noqa: E402
from effattn_lite.layers.common import ShortConvolution  # noqa: E402
from effattn_lite.tasks import mqar, state_tracking  # noqa: E402
from effattn_lite.train import Reader, evaluate, train  # noqa: E402

TASKS = {
    "mqar": dict(vocab=64, width=32, heads=2, steps=800, batch=32),
    "parity": dict(vocab=2, width=32, heads=2, steps=1000, batch=64, feed_forward=True, convolution=0),
}
"""Sizes of the reader and of the training; parity is learned on up to 40 bits."""
PAIRS = dict(pairs=8, length=48, vocab=64)
"""What MQAR asks: a size at which softmax attention learns all pairs and a state without a gate does not."""
ARGUMENTS = {"cosformer": {"max_length": 128}}
"""What a layer needs beyond width and heads; 128 tokens are the longest test."""


def words(rng, batch):
    """A batch of parity texts of one length between 3 and 40."""
    return state_tracking.parity(rng, batch=batch, length=int(rng.integers(3, 41)))


def run(job):
    """Train one mixer at one rate from one seed; a row of the record."""
    name, task, lr, seed, device = job
    torch.set_num_threads(1)
    how = dict(TASKS[task])
    steps, batch, heads = how.pop("steps"), how.pop("batch"), how.pop("heads")
    row = registry.find(name)
    layer = getattr(importlib.import_module(f"effattn_lite.layers.{name}"), row.layer)
    mixer = functools.partial(layer, how["width"], heads, **ARGUMENTS.get(name, {}))
    if any(isinstance(part, ShortConvolution) for part in mixer().modules()):
        how["convolution"] = 0  # it brings its own: two in a row are no fair start
    torch.manual_seed(seed)
    model = Reader(mixer, **how).to(device)
    if task == "mqar":
        draw = functools.partial(mqar.draw, batch=batch, **PAIRS)
        tests = {"accuracy": draw}
    else:
        draw = functools.partial(words, batch=batch)
        tests = {
            f"accuracy at {n}": functools.partial(last_of_parity, batch=batch, length=n) for n in (40, 128)
        }
    found = train(model, draw, steps=steps, lr=lr, seed=seed)
    scores = {key: round(evaluate(model, test), 4) for key, test in tests.items()}
    return {
        "task": task, "mixer": name, "lr": lr, "seed": seed, **scores, "loss": round(found["loss"], 4),
        "seconds": round(found["seconds"], 1), "state": floats(model, how["width"], device),
        "device": place(device),
    }  # fmt: skip


def last_of_parity(rng, batch, length):
    """Parity texts where only the last bit is asked."""
    tokens, targets = state_tracking.parity(rng, batch=batch, length=length)
    targets[:, :-1] = -100
    return tokens, targets


@torch.no_grad()
def floats(model, width, device):
    """Numbers that one layer carries from token to token after 64 tokens of one text."""
    cache = model.blocks[0]["mixer"].prefill(torch.zeros(1, 64, width, device=device))[1]
    return sum(x.numel() for x in leaves(cache))


def leaves(cache):
    if isinstance(cache, torch.Tensor):
        return [cache]
    parts = cache.values() if isinstance(cache, dict) else cache or ()
    return [leaf for part in parts for leaf in leaves(part)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mixers", nargs="+", default=None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the rows of --out, run only what it lacks")
    parser.add_argument("--out", default=str(ROOT / "book" / "_results" / "linear_tasks.json"))
    known = parser.parse_args()
    mixers = known.mixers or [
        n
        for n in registry.names("layer")
        if registry.find(n).causal and "linear/" in registry.find(n).chapter
    ] + ["softmax_attention"]
    jobs = [
        (name, task, lr, seed, known.device)
        for seed in range(known.seeds)
        for task in known.tasks
        for lr in known.rates
        for name in mixers
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    record = {
        "name": "linear_tasks",
        "device": place(known.device),
        "date": str(date.today()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "effattn_lite": __version__,
        },
        "commit": commit,
        "command": "python tools/linear_tasks.py " + " ".join(sys.argv[1:]),
        "tasks": {**TASKS, "mqar": TASKS["mqar"] | PAIRS},
        "rows": [],
    }
    if known.keep:
        record["rows"] = [
            row for row in json.loads(Path(known.out).read_text())["rows"] if "error" not in row
        ]
    done = {(row["mixer"], row["task"], row["lr"], row["seed"]) for row in record["rows"]}
    jobs = [job for job in jobs if (job[0], job[1], job[2], job[3]) not in done]
    with multiprocessing.get_context("spawn").Pool(known.jobs) as pool:
        for row in pool.imap_unordered(guarded, jobs):
            print(json.dumps(row), flush=True)
            record["rows"].append(row)
            Path(known.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def place(device):
    """The name of the GPU or, as Linux tells it, of the CPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def guarded(job):
    """A mixer that fails is a row less and a line more, not the end of the others."""
    try:
        return run(job)
    except Exception as error:
        return {"task": job[1], "mixer": job[0], "lr": job[2], "seed": job[3], "error": str(error)[:200]}


if __name__ == "__main__":
    main()
