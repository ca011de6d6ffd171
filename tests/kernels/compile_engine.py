"""Compile the variants of one engine for one GPU generation and print what each takes, one JSON line each.

`python tests/kernels/compile_engine.py ENGINE CAPABILITY [quick]`: no GPU is needed, but Triton's
interpreter must be off. Quick compiles, of each kernel and dtype, the variant with the largest sizes: it
breaks first.
"""

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main(engine, capability, quick=None):
    capability = int(capability)
    for name, kernel, signature, constexprs, options in variants(engine, capability, quick):
        source = ASTSource(kernel, signature, constexprs, aligned(kernel, signature))
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        taken = {"shared": compiled.metadata.shared, **resources(compiled.asm["cubin"])}
        print(json.dumps({"name": name, **taken}), flush=True)


def variants(engine, capability, quick):
    module = importlib.import_module(f"effattn_lite.kernels.{engine}")
    # tuning may depend on the capability
    takes = inspect.signature(module.variants).parameters
    found = list(module.variants(capability) if takes else module.variants())
    if capability < 80:  # Turing has no bfloat16
        found = [v for v in found if "bf16" not in kinds(v)]
    if not quick:
        return found
    widest = {}
    for variant in sorted(found, key=lambda v: sum(x for x in v[3].values() if type(x) is int)):
        widest[(variant[1].fn.__name__, *sorted(kinds(variant)))] = variant
    return list(widest.values())


def kinds(variant):
    """Element types of the arguments."""
    return {str(kind).lstrip("*") for kind in variant[2].values()}


def aligned(kernel, signature):
    """Pointers and strides that are multiples of 16, as in most real calls: loads become wide."""
    return {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.params)
        if not arg.do_not_specialize and str(signature[arg.name]).startswith(("*", "i32", "i64"))
    }


def resources(cubin):
    """Registers a thread and bytes of local memory a thread, read off the binary."""
    if not CUOBJDUMP.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": read["REG"], "local": read["STACK"] + read["LOCAL"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
