"""How much memory a call takes."""

import torch

__all__ = ["peak_mib"]


def peak_mib(call, *, device):
    """Peak of the GPU memory that a call allocates over what was there before it, MiB; None on the CPU.

    Outputs count, inputs do not.
    """
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return (peak - before) / 2**20
