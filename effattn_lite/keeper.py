"""What a training run leaves in its folder, and how it goes on from there after it was killed."""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as states

WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
LOOSE = dataclasses.replace(WHOLE, strict=False)


class Keeper:
    """Writes `settings.json`, a line a step into `log.jsonl`, and `checkpoint.pt`: the `keep` of `train`.

    A line has the step, its loss in nats, its rate, the tokens so far, and the seconds that the step took. A
    checkpoint holds weights, moments, the states of the random generators and all losses, whole, so that
    another number of processes can go on with it. The log is written before it, so it is never behind; what
    it has beyond is cut when the run goes on. A file is replaced at once or not at all.

    Args:
        settings: of the run, as JSON takes them; `out` is the folder, `steps` the last step, `every` how many
            steps lie between checkpoints.
    """

    def __init__(self, settings: dict):
        self.settings, self.folder, self.tokens = settings, Path(settings["out"]), 0
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.path, self.log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"

    def rows(self, draw: Callable, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """This process's rows of a batch, which all processes draw alike."""
        batch = draw(rng)
        self.tokens += batch[0].size
        return tuple(x[self.rank :: self.processes] for x in batch)

    def load(self, state: dict) -> None:
        """Begin the folder, or put its checkpoint into the loop's model, optimizer, rng and losses."""
        if self.path.exists():
            held = torch.load(self.path, map_location="cpu", weights_only=True)
            model, optimizer = state["model"], state["optimizer"]
            states.set_model_state_dict(model, held["model"], options=WHOLE)
            states.set_optimizer_state_dict(model, optimizer, held["optimizer"], options=LOOSE)
            for name, weight in model.named_parameters():
                # no gradient had reached it
                if name not in held["optimizer"]["state"]:
                    optimizer.state.pop(weight, None)
            state["rng"].bit_generator.state, self.tokens = held["rng"], held["tokens"]
            state["losses"].extend(held["losses"].to(next(model.parameters()).device))
            torch.set_rng_state(held["torch"])
            if held["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(held["cuda"])
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = self.log.read_bytes().splitlines(True) if self.log.exists() else []
            _replace(self.log, lambda file: file.writelines(lines[: len(state["losses"])]))
            settings = json.dumps(self.settings, indent=1)
            _replace(self.folder / "settings.json", lambda file: file.write(settings.encode()))
        self.began = time.perf_counter()

    def save(self, state: dict) -> None:
        """Write down a step: its line, and a checkpoint where one is due."""
        losses, rate = state["losses"], state["optimizer"].param_groups[0]["lr"]
        if self.processes > 1:
            dist.all_reduce(losses[-1])
            losses[-1] /= self.processes
        step, loss, now = len(losses), float(losses[-1]), time.perf_counter()
        line = dict(step=step, loss=loss, rate=rate, tokens=self.tokens, seconds=now - self.began)
        if self.rank == 0:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            _show(line, self.settings["steps"])
        if step % self.settings["every"] == 0 or step == self.settings["steps"]:
            self._checkpoint(state)
        self.began = now

    def _checkpoint(self, state):
        # every process gives its part
        model, optimizer = states.get_state_dict(state["model"], state["optimizer"], options=WHOLE)
        held = {"model": model, "optimizer": optimizer, "rng": state["rng"].bit_generator.state}
        held |= {"losses": torch.stack(state["losses"]).cpu(), "tokens": self.tokens}
        held |= {"torch": torch.get_rng_state()}
        held |= {"cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}
        if self.rank == 0:
            _replace(self.path, functools.partial(torch.save, held))


def plot(folder: str | Path) -> Path:
    """Draw the losses of a run's log into its `loss.svg`.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    from effattn_lite.plotting import style

    style()
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").open(encoding="utf-8")]
    figure = Figure()
    axes = figure.subplots()
    axes.plot([line["tokens"] for line in lines], [line["loss"] for line in lines], lw=1)
    axes.set(xlabel="tokens", ylabel="loss, nats a token asked", ylim=(0, None))
    figure.savefig(Path(folder) / "loss.svg")
    return Path(folder) / "loss.svg"


def _show(line, steps):
    alive, speed = sys.stderr.isatty(), line["tokens"] / line["step"] / line["seconds"]
    # a file gets ten lines, a terminal one that is written over
    if alive or line["step"] % max(1, steps // 10) == 0 or line["step"] == steps:
        shown = f"step {line['step']:,}/{steps:,}  loss {line['loss']:.4f}  rate {line['rate']:.2e}"
        end = "\r" if alive and line["step"] < steps else "\n"
        print(f"{shown}  {speed:,.0f} tokens/s ", end=end, file=sys.stderr, flush=True)


def _replace(path, write):
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
