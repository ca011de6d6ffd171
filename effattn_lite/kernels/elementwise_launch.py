"""Launches of the element-wise engine: segments from the size of the chip, passes of the gradients."""

import torch

from effattn_lite.kernels import elementwise as leak
from effattn_lite.kernels import elementwise_average as average
from effattn_lite.kernels.common.launch import capability, cdiv, on_device, power_of_2, processors

ROUND = 16
"""A segment is a multiple of this many tokens."""

BLOCK = 256
"""Channels of a program of the step."""


class Launcher:
    """One call's sizes and the arguments that its kernels share."""

    def __init__(self, x, cu_seqlens):
        self.B, self.T, self.D = x.shape
        self.device, self.packed = x.device, cu_seqlens is not None
        self.cu_seqlens = cu_seqlens.contiguous() if self.packed else None
        self.N = cu_seqlens.numel() - 1 if self.packed else self.B
        self.tiles = leak.tiles(self.D, capability(x))
        self.columns = cdiv(self.D, self.tiles["BD"])
        self.cut(16 * processors(x))

    def cut(self, programs):
        """Choose L, so that the grid has about that many warps, and no sequence more than 128 segments."""
        tokens = max(cdiv(self.B * self.T * self.columns, programs), cdiv(self.T, 128))
        self.L = ROUND * cdiv(tokens, ROUND)
        self.segmented = self.T > self.L
        # packed, a sequence may end anywhere: every one may have a segment that is not full
        self.segments = self.T // self.L + self.N if self.packed else self.B * cdiv(self.T, self.L)

    def empty(self, *shape):
        """An uninitialised float32 tensor on the call's device."""
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def launch(self, kernel, *tensors, **flags):
        """Run a kernel on all segments and channels; its constants are taken from the tiles by name."""
        BS = power_of_2(self.N) if self.packed else 1
        tiles = {name: x for name, x in self.tiles.items() if name in kernel.arg_names}
        kernel[(self.segments * self.columns,)](
            *tensors, self.cu_seqlens, self.T, self.L, self.N, D=self.D, BS=BS, PACKED=self.packed,
            **tiles, **flags, num_warps=1,
        )  # fmt: skip

    def leak_ends(self, x, g, *, reverse):
        """Log decay and end of every segment of a leaky sum, or None where no sequence is cut."""
        if not self.segmented:
            return None
        ends = self.empty(self.segments, 2, self.D)
        self.launch(leak.leak_write_kernel, x, g, ends, REVERSE=reverse)
        return ends

    def average_ends(self, k, v, o, g, *, reverse):
        """Sums of every segment of an average, or None where no sequence is cut."""
        if not self.segmented:
            return None
        ends = self.empty(self.segments, 3, self.D)
        self.launch(average.average_write_kernel, k, v, o, g, ends, REVERSE=reverse)
        return ends


def leak_forward(x, g, initial_state, cu_seqlens, output_final_state):
    """o of a leaky sum, and the final state (empty unless asked for)."""
    with on_device(x):
        run = Launcher(x, cu_seqlens)
        x, g, h0 = x.contiguous(), g.contiguous(), _contiguous(initial_state)
        o = torch.empty_like(x)
        ht = run.empty(run.N, run.D) if output_final_state else None
        ends = run.leak_ends(x, g, reverse=False)
        run.launch(
            leak.leak_read_kernel, x, g, h0, ends, o, ht,
            HAS_H0=h0 is not None, SEGMENTS=ends is not None, STORE_HT=output_final_state,
        )  # fmt: skip
    return o, (ht if output_final_state else run.empty(0))


def leak_backward(do, dht, g, o, initial_state, cu_seqlens):
    """Gradients of x, g and the initial state."""
    with on_device(do):
        run = Launcher(do, cu_seqlens)
        do, g, o = do.contiguous(), g.contiguous(), o.contiguous()
        h0, dht = _contiguous(initial_state), _contiguous(dht)
        dx, dg, dh0 = torch.empty_like(o), torch.empty_like(g), run.empty(0 if h0 is None else h0.shape)
        ends = run.leak_ends(do, g, reverse=True)
        run.launch(
            leak.leak_gradient_kernel, do, g, o, h0, dht, ends, dx, dg, dh0,
            HAS_H0=h0 is not None, HAS_DHT=dht is not None, SEGMENTS=ends is not None,
        )  # fmt: skip
    return dx, dg, dh0


def leak_step(x, g, state, out_state):
    """o of one token; the next state is written to `out_state`."""
    with on_device(x):
        o = torch.empty_like(x, memory_format=torch.contiguous_format)
        leak.leak_step_kernel[(cdiv(x.numel(), BLOCK),)](
            x.contiguous(), g.contiguous(), state, o, out_state, x.numel(), BLOCK=BLOCK, num_warps=4
        )
    return o


def average_forward(k, v, g, u, initial_state, cu_seqlens, output_final_state):
    """o of an average, and the final sums [3, N, D] (empty unless asked for)."""
    with on_device(k):
        run = Launcher(k, cu_seqlens)
        k, v, g, u = k.contiguous(), v.contiguous(), _float32(g), _float32(u)
        start = _contiguous(initial_state)
        o = torch.empty_like(v)
        end = run.empty(3, run.N, run.D) if output_final_state else None
        ends = run.average_ends(k, v, None, g, reverse=False)
        run.launch(
            average.average_read_kernel, k, v, g, u, start, ends, o, end, *[None] * 5,
            HAS_H0=start is not None, SEGMENTS=ends is not None, STORE_HT=output_final_state, SLOPES=False,
        )  # fmt: skip
    return o, (end if output_final_state else run.empty(0))


def average_backward(do, dend, k, v, g, u, o, end, initial_state, cu_seqlens):
    """Gradients of k, v, g, u and the initial sums; of the forward, o and the final sums are kept."""
    with on_device(k):
        run = Launcher(k, cu_seqlens)
        do, k, v, o = do.contiguous(), k.contiguous(), v.contiguous(), o.contiguous()
        g, u, start, end, dend = _float32(g), _float32(u), *map(_contiguous, (initial_state, end, dend))
        # packed, the last programs may have no segment: their shares are 0
        dg, du = torch.zeros(2, run.segments, run.D, device=run.device)
        lse, slopes = run.empty(k.shape), run.empty(run.segments, 3, run.D)
        marks = torch.empty(run.segments, run.D, dtype=torch.int32, device=run.device)
        ends = run.average_ends(k, v, None, g, reverse=False)
        cut, has = dict(SEGMENTS=ends is not None), dict(HAS_H0=start is not None)
        run.launch(
            average.average_read_kernel, k, v, g, u, start, ends, None, None, do, lse, dg, slopes, marks,
            **cut, **has, STORE_HT=False, SLOPES=True,
        )  # fmt: skip
        ends = run.average_ends(lse, do, o, g, reverse=True)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        dstart = run.empty(0 if start is None else start.shape)
        run.launch(
            average.average_gradient_kernel,
            k, v, g, u, start, end, o, do, dend, lse, ends, slopes, marks, dk, dv, dg, du, dstart,
            **cut, **has, HAS_DHT=dend is not None,
        )  # fmt: skip
    return dk, dv, dg.sum(0), du.sum(0), dstart


def average_step(k, v, g, u, a, b, m, out_a, out_b, out_m):
    """o of one token; the next sums are written to `out_a`, `out_b` and `out_m`."""
    with on_device(k):
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        average.average_step_kernel[(cdiv(k.numel(), BLOCK),)](
            k.contiguous(), v.contiguous(), _float32(g), _float32(u), a, b, m, o, out_a, out_b, out_m,
            k.numel(), D=k.shape[-1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return o


def _contiguous(x):
    return None if x is None else x.contiguous()


def _float32(x):
    return x.float().contiguous()
