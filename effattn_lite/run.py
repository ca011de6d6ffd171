"""A run of the training loop that can be stopped: `python -m effattn_lite train`, in one process or several.

What it leaves in its folder, `effattn_lite.keeper` says. A run that was killed goes on with the losses that
it would have had. Under torchrun the weights are split over the processes (FSDP2), and each reads its rows of
a batch.
"""

import dataclasses
import functools
import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from effattn_lite import models
from effattn_lite.keeper import Keeper
from effattn_lite.registry import find, names
from effattn_lite.tasks import copying, induction, mqar, state_tracking, text
from effattn_lite.tasks.ask import NOTHING
from effattn_lite.train import Reader, train

TASKS = {
    "mqar": (mqar.draw, 512),
    "induction": (induction.draw, 16),
    "copying": (copying.draw, 16),
    "parity": (state_tracking.parity, 2),
    "permutations": (state_tracking.permutations, 6),
}
"""Synthetic tasks: what draws samples, and how many tokens there are."""
READERS = {"tiny": dict(width=64, heads=2, depth=2), "small": dict(width=256, heads=4, depth=4)}
"""Presets of the `Reader` around a method's layer."""
FREE = ("out", "every", "device", "resume")
"""Settings that may change when a run goes on."""


def _setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What a run is: each field is an option of the command line, and its help says what it means."""

    model: str = _setting("", "an architecture, as samba, or a method with a layer, as retnet")
    data: str = _setting("", f"{', '.join([*text.CORPORA, *TASKS])}, or a file, read as bytes")
    out: str = _setting("", "folder of the run")
    preset: str = _setting("tiny", "size of the model")
    steps: int = _setting(200, "changes of the weights")
    lr: float = _setting(1e-3, "largest learning rate")
    batch: int = _setting(16, "texts a batch, over all processes")
    length: int = _setting(0, "tokens a text; 0 is 256 bytes, or what the task has")
    accumulate: int = _setting(1, "batches a step")
    seed: int = _setting(0, "of weights and samples")
    bf16: bool = _setting(False, "compute products in bfloat16; weights stay float32")
    compile: bool = _setting(False, "compile the layers")
    recompute: bool = _setting(False, "keep no activations inside layers: less memory, a third more work")
    device: str = _setting("", "cpu or cuda; default cuda where there is one")
    every: int = _setting(50, "steps from one checkpoint to the next")
    resume: bool = _setting(False, "go on with the run that is in the folder")

    def __post_init__(self):
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        low = {"steps": 1, "batch": 1, "accumulate": 1, "every": 1, "length": 0, "seed": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least {least}")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}, expected more than 0")
        if self.device not in ("", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}, expected cpu or cuda")


def settings_of(given: Mapping[str, object]) -> Settings:
    """The settings of a new run, or with `resume` of the one in the folder `out`.

    Raises:
        ValueError: one that is missing or does not fit, with its name; a folder that holds a run which is not
            to be resumed, or none that could be; a setting other than that of the run.
    """
    path = Path(given.get("out", "")) / "settings.json"
    if not given.get("resume"):
        if path.exists():
            raise ValueError(f"--out is {path.parent}, which holds a run: give --resume, or another folder")
        return Settings(**given)
    if not path.exists():
        raise ValueError(f"--resume finds no run in --out {given.get('out', '')!r}")
    held = json.loads(path.read_text(encoding="utf-8"))
    for name in given.keys() & held.keys() - set(FREE):
        if given[name] != held[name]:
            raise ValueError(f"--{name} is {given[name]}, but the run was begun with {held[name]}")
    return Settings(**held | given)


def run(settings: Settings) -> dict[str, float]:
    """Train a model, or go on with it, and try it on what is held out.

    Under torchrun it joins the other processes, and leaves the process group to the caller's end.

    Returns:
        loss: mean of the last tenth of the steps, nats; held_out and accuracy: as in `held_out`; seconds: of
        this part of the run.

    Raises:
        ValueError: a setting that does not fit, with its name.
    """
    device = _begin(settings)
    vocab, draw, test = source(settings)
    # sizes that do not fit are said now, not after the training
    length, _ = (ask(np.random.default_rng(0))[0].shape[1] for ask in (draw, test))
    torch.manual_seed(settings.seed)
    model = build(settings, vocab, length=length).to(device)
    prepare(model, bf16=settings.bf16, compiled=settings.compile, recompute=settings.recompute)
    keep = Keeper(dataclasses.asdict(settings))
    found = train(
        model, functools.partial(keep.rows, draw), steps=settings.steps, lr=settings.lr, seed=settings.seed,
        accumulate=settings.accumulate, keep=keep,
    )  # fmt: skip
    return found | held_out(model, test)


def source(settings: Settings) -> tuple[int, Callable, Callable]:
    """The number of tokens, and what draws a batch to train on and one to test on."""
    sizes = {"batch": settings.batch} | ({"length": settings.length} if settings.length else {})
    if settings.data in TASKS:
        draw, vocab = TASKS[settings.data]
        return vocab, *[functools.partial(draw, **sizes)] * 2
    known = [*text.CORPORA, *TASKS]
    if settings.data not in known and not Path(settings.data).is_file():
        raise ValueError(f"--data is {settings.data!r}, expected a file or one of {', '.join(known)}")
    parts = text.load(settings.data)
    return text.VOCAB, *(functools.partial(text.draw, **sizes, text=part) for part in parts)


def build(settings: Settings, vocab: int, *, length: int) -> nn.Module:
    """An architecture's preset with as many tokens as the data has, or a `Reader` around a method's layer."""
    name, preset = settings.model, settings.preset
    if name not in models.names() + names("layer"):
        found = f"an architecture ({', '.join(models.names())}) or a method with a layer"
        raise ValueError(f"--model is {name!r}, expected {found}, as `python -m effattn_lite list` shows")
    table = models.recipe(name).PRESETS if name in models.names() else READERS
    if preset not in table:
        raise ValueError(f"--preset is {preset!r}, expected one of {', '.join(table)}")
    if table is READERS:
        return _reader(name, vocab, **READERS[preset])
    from effattn_lite.models.lm import LanguageModel

    config = dataclasses.replace(table[preset], vocab=vocab)
    if 0 < config.positions < length:
        raise ValueError(f"--length is {length}, expected at most {name}'s {config.positions} positions")
    return LanguageModel(config)


def _reader(name, vocab, *, width, heads, depth):
    if not find(name).causal:
        raise ValueError(
            f"--model is {name!r}, expected one that is causal: this one sees what it should tell"
        )
    layer = getattr(importlib.import_module(f"effattn_lite.layers.{name}"), find(name).layer)
    try:
        return Reader(lambda: layer(width, heads), vocab=vocab, width=width, depth=depth, feed_forward=True)
    except TypeError as error:
        raise ValueError(f"--model is {name!r}, whose layer needs more than sizes: {error}") from error


def prepare(model: nn.Module, *, bf16=False, compiled=False, recompute=False) -> nn.Module:
    """The same function, computed otherwise; in several processes each keeps a part of the weights.

    Args:
        model: a `Reader` or a `LanguageModel`, on its device; it is changed.
        bf16: autocast products to bfloat16.
        compiled: compile each layer.
        recompute: compute each layer again in the backward pass, instead of keeping its activations.
    """
    parts, device = list(_parts(model)), next(model.parameters()).device
    for part, how in parts:
        if compiled:
            setattr(part, how, torch.compile(getattr(part, how)))
        if recompute:
            setattr(part, how, functools.partial(_twice, getattr(part, how)))
    if dist.is_initialized():
        # the view is a layer's cache, which training does not read
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        owned = [id(p) for part, _ in parts for p in part.parameters()]
        # layers that share weights are split with the rest, since a weight has one owner
        for part, how in parts if len(owned) == len(set(owned)) else ():
            if how == "forward":
                fully_shard(part, mesh=mesh)
                continue
            # FSDP passes on a copy of a dict, and what layers lend each other would be lost in it
            setattr(part, how, functools.partial(_open, getattr(part, how)))
            fully_shard(part, mesh=mesh)
            register_fsdp_forward_method(part, how)
            setattr(part, how, functools.partial(_close, getattr(part, how)))
        # the head reads the weights after `read`, so they stay whole until the backward pass
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "read")
    if bf16:
        scores = (model.scores, "forward") if isinstance(model.scores, nn.Module) else (model, "scores")
        for owner, how in ((model, "read"), scores):
            setattr(owner, how, torch.autocast(device.type, torch.bfloat16)(getattr(owner, how)))
    return model


def _close(call, *inputs, shared, **more):
    return call(*inputs, lent=lambda: shared, **more)


def _open(call, *inputs, lent, **more):
    return call(*inputs, shared=lent(), **more)


def _twice(call, x, *more, shared=None, **options):
    if shared is None:
        return checkpoint(call, x, *more, use_reentrant=False, **options)
    before = dict(shared)

    def alone(x, *more):
        # later layers may lend under the same name: the second time, this one borrows what it did the first
        seen = dict(before)
        return call(x, *more, shared=seen, **options), seen

    y, seen = checkpoint(alone, x, *more, use_reentrant=False)
    shared.update(seen)
    return y


def _parts(model):
    for block in model.blocks:
        if isinstance(block, nn.ModuleDict):
            yield from ((block[name], "forward") for name in ("mixer", "mlp") if name in block)
        else:
            yield block, "prefill"


@torch.no_grad()
def held_out(model: nn.Module, draw: Callable, *, batches: int = 8, seed: int = 10**6) -> dict[str, float]:
    """Loss, nats a token asked, and share of right answers, on samples that training has not drawn."""
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    model.eval()
    loss = right = count = 0
    for _ in range(batches):
        tokens, targets = (torch.as_tensor(x, device=device) for x in draw(rng))
        asked = targets != NOTHING
        scores = model.scores(model.read(tokens)[asked]).float()
        loss += float(F.cross_entropy(scores, targets[asked], reduction="sum"))
        right += int((scores.argmax(-1) == targets[asked]).sum())
        count += int(asked.sum())
    return {"held_out": loss / count, "accuracy": right / count}


def _begin(settings):
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch % processes:
        raise ValueError(f"--batch is {settings.batch}, expected a multiple of the {processes} processes")
    if processes > 1 and not dist.is_initialized():
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name)
