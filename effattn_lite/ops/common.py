"""What every op needs at its boundary: which implementation, and errors that name both sides."""

import importlib.util
import os

import torch

IMPLS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# found out once: torch.compile cannot trace the search
_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is on, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_triton() -> bool:
    """Whether triton can be imported."""
    return _TRITON


def choose_impl(impl: str, q: torch.Tensor, *, refusal: str | None = None) -> str:
    """Resolve `impl` to "torch" or "triton" for tensors like q.

    Args:
        impl: "auto", "torch" or "triton"; an explicit "triton" never falls back.
        q: a tensor of the call; its device and dtype decide.
        refusal: why the engine cannot take this call, e.g. "K <= 256, got 512"; None if it can.

    Raises:
        ValueError: unknown impl, or "triton" without triton or without a device it runs on.
        TypeError: "triton" with a dtype no kernel takes.
        NotImplementedError: "triton" with a `refusal`.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, expected one of {IMPLS}")
    if impl == "torch":
        return "torch"
    fits = q.is_cuda and has_triton() and q.dtype in DTYPES and refusal is None
    if impl == "auto":
        return "triton" if fits else "torch"
    if not has_triton():
        raise ValueError("impl is 'triton', but triton is not installed; use impl='torch'")
    if q.dtype not in DTYPES:
        raise TypeError(f"impl='triton' takes float32, bfloat16 or float16, got {q.dtype}")
    if not q.is_cuda and not interpreting():
        raise ValueError(
            f"impl is 'triton', but q is on {q.device}: move it to a GPU, or set TRITON_INTERPRET=1"
        )
    if refusal is not None:
        raise NotImplementedError(f"impl='triton' needs {refusal}; use impl='torch'")
    return "triton"


def check_shape(name: str, x: torch.Tensor, axes: str, sizes: dict[str, int], like: str = "q") -> None:
    """Check a tensor against named axes, filling in sizes not known yet.

    `check_shape("k", k, "B T H K", sizes)` raises ValueError with both sides when they differ.
    """
    names = axes.split()
    spec = "[" + ", ".join(names) + "]"
    if x.ndim != len(names):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {len(names)} axes {spec}")
    expected = tuple(sizes.setdefault(a, n) for a, n in zip(names, x.shape, strict=True))
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {spec} = {expected} as {like}")


def check_alike(name: str, x: torch.Tensor, q: torch.Tensor, *, dtype: bool = True, like: str = "q") -> None:
    """Check that a tensor lies on q's device and, unless `dtype` is False, has q's dtype."""
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, expected {q.device} as {like}")
    if dtype and x.dtype != q.dtype:
        raise TypeError(f"{name} is {x.dtype}, expected {q.dtype} as {like}")


def check_heads(H: int, HKV: int) -> None:
    """Check that query heads divide evenly over key/value heads."""
    if HKV == 0 or H % HKV:
        raise ValueError(f"q has {H} heads, expected a multiple of k's {HKV}")


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, B: int, T: int) -> None:
    """Check packed-sequence boundaries: [N + 1] integers that rise from 0 to T, with B = 1.

    Reading the values waits for the device; under torch.compile only what needs no values is checked.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [N + 1] with N >= 1")
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences into one batch row, but q has B = {B}, expected 1")
    if torch.compiler.is_compiling() or cu_seqlens.is_cuda:
        return
    steps = cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != T or bool((steps < 0).any()):
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}, expected to rise from 0 to T = {T}")


def by_sequence(
    function, cu_seqlens: torch.Tensor | None, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Call a function of tensors [1, T, ...], T >= 1, on each packed sequence by itself; join its outputs."""
    if cu_seqlens is None:
        return function(*tensors)
    edges = cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]
    parts = [function(*(x[:, span] for x in tensors)) for span in spans]
    return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True))


def register(name: str, schema: str, run, fake) -> None:
    """Define the torch operator `effattn_lite::name`, so that torch.compile and torch.export see one node.

    Args:
        name: operator name.
        schema: arguments and returns, e.g. "(Tensor q, float scale) -> Tensor".
        run: launches the kernels, on CUDA tensors or, in the interpreter, on CPU tensors.
        fake: same signature; returns empty tensors of the right shapes.
    """
    qualified = f"effattn_lite::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default")(run)
    torch.library.register_fake(qualified)(fake)
