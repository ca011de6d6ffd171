"""What Triton's compiler makes of a kernel for a GPU that is not here: memory, registers, instructions.

Nothing is launched, so no GPU is needed. The compiler runs in a process of its own, since this one may have
Triton's interpreter on. No import of triton at the top.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

__all__ = ["Compiled", "compile_all"]

Compiled = namedtuple("Compiled", "shared registers spilled instructions")
Compiled.__doc__ = """What one program of a compiled kernel takes.

shared: bytes of shared memory. registers: 32-bit registers a thread, None where triton bundles no cuobjdump.
spilled: bytes a thread of local memory, of registers that did not fit; None as before. instructions: name
-> how often it stands in the PTX text: "wgmma", "mma", "fma", "cp.async".
"""

_PATTERNS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "fma": r"\bfma\.rn",
    "cp.async": r"cp\.async\.c",
}

_SCRIPT = """
import json, sys
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

{source}

folder = Path(sys.argv[1])
for i, job in enumerate(json.loads((folder / "jobs.json").read_text())):
    names, fixed = {name}.arg_names, job["constants"]
    kinds = {{n: "constexpr" if n in fixed else job["arguments"][n] for n in names}}
    wide = {{(j,): [["tt.divisibility", 16]] for j, n in enumerate(names) if n not in fixed}}
    source, target = ASTSource({name}, kinds, fixed, wide), GPUTarget("cuda", job["capability"], 32)
    built = triton.compile(source, target=target, options=job["options"])
    (folder / f"{{i}}.cubin").write_bytes(built.asm["cubin"])
    (folder / f"{{i}}.ptx").write_text(built.asm["ptx"])
    print(built.metadata.shared, Path(triton.__file__).parent, flush=True)
"""


def compile_all(kernel, jobs):
    """Compile a kernel once for each job, and read off what it takes.

    Pointers and integers are taken to be multiples of 16, as in most real calls: loads become wide.

    Args:
        kernel: a @triton.jit function that calls no other one of yours; it may be defined in a notebook.
        jobs: dicts with `capability`, 75 for a T4, 80 for an A100, 90 for an H100; `arguments`, name ->
            type in Triton's spelling, "*fp16", "i32"; `constants`, name -> value of each constexpr, and of
            each argument to be fixed, as a stride of 1; `options`, num_warps and num_stages.

    Returns:
        One `Compiled` a job.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: the compiler refused; the message ends with its last line.

    Cost: about a second for the process, then 0.1 to 2 s a job (2 CPU cores, triton 3.7.1).
    """
    import triton  # noqa: F401 - a clear error before a process is started

    function = kernel.fn
    script = _SCRIPT.format(source=textwrap.dedent(inspect.getsource(function)), name=function.__name__)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.py").write_text(script, encoding="utf-8")
        (Path(folder) / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        run = subprocess.run(
            [sys.executable, Path(folder) / "job.py", folder], env=env, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(f"compiling {function.__name__} failed: {run.stderr.strip().splitlines()[-1]}")
        return [_read(Path(folder), i, line) for i, line in enumerate(run.stdout.splitlines())]


def _read(folder, i, line):
    shared, home = line.split(" ", 1)
    ptx = (folder / f"{i}.ptx").read_text(encoding="utf-8")
    count = {name: len(re.findall(pattern, ptx)) for name, pattern in _PATTERNS.items()}
    tool = Path(home) / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return Compiled(int(shared), None, None, count)
    command = [tool, "--dump-resource-usage", folder / f"{i}.cubin"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(int(shared), used["REG"], used["STACK"] + used["LOCAL"], count)
