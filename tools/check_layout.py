"""Imports go one way, names have their rooms, files stay small: prints one line a finding, exits with 1."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "effattn_lite"
sys.path.insert(0, str(ROOT))

from effattn_lite import METHODS  # noqa: E402
from effattn_lite.models.kinds import KINDS  # noqa: E402

# no room imports one that stands after a later "<"
RANKS = """__init__ registry notation < data < reference < testing counting plotting < explore exercises
< kernels < ops < layers < models < tasks < train < keeper < run < bench < __main__"""
RANK = {room: i for i, rooms in enumerate(RANKS.split("<")) for room in rooms.split()}
ROOMS = {"reference": "reference", "ops": "op", "layers": "layer", "models": "model"}
SHARED = {"__init__", "common", "block", "lm", "hybrid"}
ORACLES = {"reference", "testing", "counting", "plotting", "explore", "exercises"}
LINES, FUNCTION, KERNEL, SECONDS = 300, 50, 120, 0.3
LIGHT = """import sys, time; start = time.perf_counter(); import effattn_lite
print(time.perf_counter() - start, *{"torch", "triton"} & set(sys.modules))"""


def main():
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in check_file(path)]
    found += [*check_names(), *check_limits(), *check_import()]
    print("\n".join(found) or "layout: no findings")
    return int(bool(found))


def check_file(path):
    where, parts = path.relative_to(ROOT), path.relative_to(PACKAGE).with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    if parts[0] not in RANK:
        yield f"{where}: {parts[0]} is no room of the package"
        return
    if {"utils", "util", "helpers", "helper", "misc"} & set(parts):
        yield f"{where}: a shared thing has a name of its own"
    # a table is as long as it has rows
    if text.count("\n") > LINES and parts[0] != "registry":
        yield f"{where}: {len(text.splitlines())} lines, at most {LINES}"
    tree = ast.parse(text)
    yield from (f"{where}:{line}" for line in [*check_functions(tree), *check_imports(tree, parts)])


def check_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[min(1, len(node.body) - 1)] if ast.get_docstring(node) else node.body[0]
            length, jit = (
                node.end_lineno - first.lineno + 1,
                any("jit" in ast.unparse(d) for d in node.decorator_list),
            )
            if length > (KERNEL if jit else FUNCTION):
                yield f"{node.lineno}: {node.name} has {length} lines, at most {KERNEL if jit else FUNCTION}"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    for node in [*tree.body, *(method for owner in classes for method in owner.body)]:
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} is public and has no docstring"


def check_imports(tree, parts):
    room, top = parts[0], {id(node) for node in tree.body}
    for node in ast.walk(tree):
        for first, *rest in modules(node):
            target = rest[0] if rest and rest[0] in RANK else "__init__"
            if room == "reference" and first != "numpy":
                yield f"{node.lineno}: a reference imports numpy alone, not {first}"
            elif first != "effattn_lite":
                light = id(node) not in top or first in sys.stdlib_module_names | {"numpy"}
                if RANK[room] <= RANK["exercises"] and not light:
                    yield f"{node.lineno}: {room} imports {first} at the top, where only NumPy may be"
            elif RANK[target] > RANK[room] and not (room == "ops" and target == "kernels"):
                yield f"{node.lineno}: {room} imports {target}, which stands above it"
            elif room in ("kernels", "ops") and target in ORACLES:
                yield f"{node.lineno}: {room} imports {target}, but an oracle must be independent"
            elif (
                room == target and parts[-1] in METHODS and rest[1:2] and rest[1] in {*METHODS} - {parts[-1]}
            ):
                yield f"{node.lineno}: {parts[-1]} imports its sibling {rest[1]}"


def modules(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [[*(node.module or "").split("."), alias.name] for alias in node.names]
    return []


def check_names():
    owned = {folder: {n for n, row in METHODS.items() if room in row.rooms} for folder, room in ROOMS.items()}
    engines = {row.engine for row in METHODS.values()}
    owned |= {"kernels": {*engines}, "ops/engines": {*engines}}
    # what methods over features share stands on two engines; what selects blocks ends in one public op;
    # two learn the same gate
    owned["ops/engines"] |= {"feature_map", "block_sparse", "token_sparse", "attention_gate"}
    owned["kernels"] |= {"block_sparse"}
    owned["ops"] |= {"block_sparse_attention", "cache"}
    # what the recipes share: the model, how the weights of others are read, and every kind of part
    owned["models"] |= {"config", "convert", "gguf", "kinds", "llama", "meta", "norm", "pages", "rotary"}
    owned["models"] |= {"rows", "sampling", "sparse", "theirs", "tokenizer"}
    owned["models"] |= {
        file.rsplit(".", 1)[1] for file, _ in (kind.path.split(":") for kind in KINDS.values())
    }
    for folder, allowed in owned.items():
        for path in sorted((PACKAGE / folder).glob("*.py")):
            # an engine may be cut into files: decay.py, decay_launch.py
            part = folder == "kernels" and path.stem.startswith(tuple(f"{name}_" for name in allowed))
            if path.stem not in allowed | SHARED and not part:
                yield f"{path.relative_to(ROOT)}: no row of the registry promises it"
    for path in sorted((ROOT / "tests" / "methods").glob("test_*.py")):
        if path.stem.removeprefix("test_") not in METHODS:
            yield f"{path.relative_to(ROOT)}: no method has this name"


def check_limits():
    for name, row in METHODS.items():
        path = ROOT / "tests" / "methods" / f"test_{name}.py"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for other in row.reduces_to if (PACKAGE / "reference" / f"{name}.py").exists() else ():
            if f"def test_reduces_to_{other}(" not in text:
                yield f"{path.relative_to(ROOT)}: no test_reduces_to_{other}, which the registry claims"


def check_import():
    # the second run has its bytecode
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    run.check_returncode()
    seconds, *loaded = run.stdout.split()
    slow = [f"import effattn_lite takes {seconds} s, at most {SECONDS}"] if float(seconds) > SECONDS else []
    return slow + [f"import effattn_lite loads {module}" for module in loaded]


if __name__ == "__main__":
    sys.exit(main())
