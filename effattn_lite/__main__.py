"""The command line: `python -m effattn_lite where|list|check|bench NAME`, and `train --model NAME ...`."""

import argparse
import math
import os
import sys

from effattn_lite.registry import METHODS, PACKAGE, find, names, room_file

ROOT = PACKAGE.parent


def main(arguments=None):
    """Run one command; returns its exit code: 0, 1 for a law or run that failed, 2 for a wrong argument."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    # its options are the fields of a class whose module loads torch, which the other commands do without
    if arguments[:1] == ["train"]:
        _train_options(parser.commands.choices["train"])
    known = parser.parse_args(arguments)
    try:
        return known.run(known) or 0
    except ValueError as error:
        print(f"{parser.prog} {known.command}: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m effattn_lite", description="Find, check and measure a method; train a model."
    )
    parser.commands = commands = parser.add_subparsers(dest="command", required=True)
    text = "train a model, or a small reader around a method's layer"
    commands.add_parser("train", help=text, description=text).set_defaults(run=train)
    for name, run, text in (
        ("where", where, "print a method's row and its files"),
        ("list", list_methods, "print all methods and the rooms that stand"),
        ("check", check, "run the laws of a method"),
        ("bench", bench, "measure a method's op on the GPU, or on the CPU at small sizes"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if name != "list":
            command.add_argument("name", help="a method's name or alias, e.g. retnet")
    command.add_argument("--record", action="store_true", help="write book/_results/NAME.json")
    command.add_argument("--length", type=int, action="append", help="a value of T; may be given again")
    command.add_argument("--dtype", default=None, help="float32, float16 or bfloat16")
    command.add_argument("--alone", action="store_true", help="without peers and plain torch: a minute less")
    return parser


def where(known):
    """Print a method's row: what it is, then the file of each room, or what is missing."""
    row = find(known.name)
    print(f"{row.title}  ({row.name}; {row.family}; survey {row.survey})")
    files = [(room, room_file(row, room), None) for room in row.rooms]
    files.append(("chapter", ROOT / "book" / f"{row.chapter}.md", f"book/{row.chapter}.md"))
    files.append(
        ("tests", ROOT / "tests" / "methods" / f"test_{row.name}.py", f"tests/methods/test_{row.name}.py")
    )
    files.append(
        ("results", ROOT / "book" / "_results" / f"{row.name}.json", f"book/_results/{row.name}.json")
    )
    for room, file, planned in files:
        stands = file is not None and file.exists()
        shown = file.relative_to(ROOT) if stands else planned or "not written"
        print(f"  {'■' if stands else '□'} {room:<10} {shown}")
    if row.inputs:
        print(
            "  inputs     " + ", ".join(f"{t} [{axes.replace(' ', ', ')}]" for t, axes in row.inputs.items())
        )
    if row.state:
        print("  state      " + ", ".join(f"[{axes.replace(' ', ', ')}]" for axes in row.states))
    for other, setting in row.reduces_to.items():
        print(f"  is {other} where {setting}")


def list_methods(known):
    """Print one line a method: filled squares for the rooms that stand, hollow ones for those promised."""
    standing = {room: set(names(room)) for room in ("reference", "op", "kernel", "layer", "model")}
    print(f"{'method':<26}{'family':<20}" + "".join(f"{room:<11}" for room in standing))
    for name, row in METHODS.items():
        cells = (
            "■" if name in found else "□" if room in row.rooms else "·" for room, found in standing.items()
        )
        print(f"{name:<26}{row.family:<20}" + "".join(f"{cell:<11}" for cell in cells).rstrip())


def check(known):
    """Run the method's laws with pytest; without the tests, compare its forms and its op."""
    name = find(known.name).name
    if not any(name in names(room) for room in ("reference", "op", "kernel", "layer", "model")):
        raise ValueError(f"{name} has no room that stands yet")
    if (ROOT / "tests" / "laws").is_dir():
        import pytest

        own = ROOT / "tests" / "methods" / f"test_{name}.py"
        room = ROOT / "tests" / ("models" if name in names("model") else "laws")
        paths = [str(room), *([str(own)] if own.exists() else [])]
        return int(pytest.main([*paths, "-q", "-m", "not slow"], plugins=[_Only(name)]) != 0)
    return _check_model(name) if name in names("model") else _check_installed(name)


class _Only:
    """A pytest plugin that keeps one method's tests: its own file, and the laws' cases of its name."""

    def __init__(self, name):
        self.name = name

    def pytest_collection_modifyitems(self, items):
        """Drop the tests of other methods."""
        items[:] = [item for item in items if self._owns(item)]

    def _owns(self, item):
        given = getattr(getattr(item, "callspec", None), "params", {})
        case = getattr(given.get("case"), "name", given.get("name"))
        return self.name == case or item.path.name == f"test_{self.name}.py"


def _check_installed(name):
    from effattn_lite.testing import make_inputs, relative_error, run_op, run_reference, to_torch

    row, failed = find(name), 0
    for options in row.options:
        inputs = make_inputs(name, T=37, state=True)
        want = run_reference(name, inputs, **options)
        found = {form: run_reference(name, inputs, form=form, **options) for form in row.forms[1:]}
        if name in names("op"):
            found["op, torch"] = run_op(name, to_torch(inputs), impl="torch", **options)
        for what, got in found.items():
            error = relative_error(got, want)
            failed += not error < 1e-10
            print(f"{name} {dict(options)}: {what} = {row.forms[0]}, relative error {error:.1e}")
    return int(failed > 0)


def _check_model(name):
    import torch

    from effattn_lite import models
    from effattn_lite.testing import relative_error

    model, cache, logits = models.build(name, dtype=torch.float64), None, []
    tokens = torch.arange(37)[None] % model.config.vocab
    for token in tokens.unbind(1):
        last, cache = model.step(token, cache)
        logits.append(last)
    error = relative_error(torch.stack(logits, dim=1), model(tokens))
    print(f"{name}, tiny: a step a token = all at once, relative error {error:.1e}")
    return int(not error < 1e-10)


def bench(known):
    """Measure a method and print its rows; --record keeps them."""
    name = find(known.name).name
    if name not in names("op"):
        raise ValueError(f"{name} has no op yet, so there is nothing to measure")
    import torch

    from effattn_lite.bench import record, roofline, suite

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = known.dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in suite.BYTES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(suite.BYTES)}")
    ceiling = roofline.ceilings(device=device, dtype=dtype)
    print("ceilings: " + ", ".join(f"{what} {value:.3g}" for what, value in ceiling.items()))
    asked = "".join(f" --length {n}" for n in known.length or ()) + (
        f" --dtype {dtype}" if known.dtype else ""
    )
    command = f"python -m effattn_lite bench {name}{asked} --record"
    rows = []

    def keep(row):
        _print_row(row)
        rows.append(row)
        if known.record:  # after every row: a run that is cut short keeps what it has
            record.write(record.make(name, rows, device=device, ceilings=ceiling, command=command))

    suite.rows_of(
        name, device=device, dtype=dtype, ceiling=ceiling, lengths=known.length, peers=not known.alone,
        report=keep,
    )  # fmt: skip
    if not rows:
        raise ValueError(f"{name}: no implementation ran")


def _print_row(row):
    floor = f"floor {row['floor_ms']:9.3f}" if row["floor_ms"] else ""
    peak = f"peak {row['peak_mib']:8.0f} MiB" if row["peak_mib"] is not None else ""
    options = " ".join(f"{k}={v}" for k, v in row["options"].items())
    print(
        f"{row['op']} {options:<24} T {row['shape']['T']:>7} {row['pass']:<17} {row['impl']:<40} "
        f"{row['ms']:9.3f} ms {floor} {peak}",
        flush=True,
    )


def _train_options(command):
    import dataclasses

    from effattn_lite.run import Settings

    for field in dataclasses.fields(Settings):
        default, text = field.default, field.metadata["help"]
        kind = {"action": "store_true"} if default is False else {"type": type(default)}
        shown = "" if default in ("", False) else f" (default {default})"
        # only what is given is set, so that a resumed run keeps the rest
        command.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text + shown, **kind)


def train(known):
    """Train as the options say; what a run leaves in its folder `effattn_lite.keeper` says."""
    import torch.distributed as dist

    from effattn_lite.keeper import plot
    from effattn_lite.run import run, settings_of

    given = {name: value for name, value in vars(known).items() if name not in ("command", "run")}
    settings = settings_of(given)
    found = run(settings)
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)):
        return
    nats, right = found["held_out"], found["accuracy"]
    print(f"held out: loss {nats:.4f} nats = {nats / math.log(2):.4f} bits a token, {right:.3f} right")
    try:
        print(f"{plot(settings.out)} shows the losses")
    except ModuleNotFoundError:
        print("no loss.svg: matplotlib is missing")


if __name__ == "__main__":
    # cp1252 and ASCII consoles have no squares
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
