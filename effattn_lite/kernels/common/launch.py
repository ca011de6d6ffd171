"""Before a launch: which GPU it is, how wide a tile must be, which packed sequence a program works on."""

import functools
from contextlib import nullcontext

import torch

INTERPRETER = 0
"""Stands for a capability when tensors lie on the CPU, where Triton's interpreter runs the kernels."""


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(x: torch.Tensor) -> int:
    """Compute capability of a tensor's GPU, 90 for 9.0; INTERPRETER on the CPU."""
    return _capability(x.device.index) if x.is_cuda else INTERPRETER


def on_device(x):
    """Makes x's GPU the current one, where a launch goes."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def choose(table: dict[int, object], capability: int):
    """The entry of the newest generation in the table that is not newer than the GPU."""
    return table[max(c for c in table if c <= capability)]


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of a tensor's GPU; 2 on the CPU, so that a small grid has several programs there."""
    return _processors(x.device.index) if x.is_cuda else 2


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0; `triton.cdiv` costs the host some microseconds a call."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def padded(n: int) -> int:
    """Width of a tile that holds n columns: a power of two, at least 16, as `tl.dot` asks."""
    return max(16, power_of_2(n))


def readable(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, K] itself, or a copy if its last axis is not contiguous or its tokens lie too far apart."""
    # inside a tile, at most 128 tokens high, offsets are int32
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def tile_table(cu_seqlens: torch.Tensor, T: int, block: int) -> torch.Tensor:
    """Sequence and tile of each program over packed sequences, [NT, 2] int32; sequence -1: nothing to do.

    NT = T // block + N bounds the number of tiles without reading the edges, so nothing waits for the GPU.
    """
    N = cu_seqlens.numel() - 1
    ends = ((cu_seqlens.diff() + block - 1) // block).cumsum(0)  # [N]: tiles up to and with each sequence
    i = torch.arange(T // block + N, device=cu_seqlens.device, dtype=ends.dtype)
    n = torch.searchsorted(ends, i, right=True)  # [NT]
    first = torch.nn.functional.pad(ends, (1, 0))[n]
    return torch.stack((torch.where(n < N, n, -1), i - first), dim=1).to(torch.int32)
