"""Launches of the gated-decay engine: segments from the size of the chip, two passes of the backward."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2, processors
from effattn_lite.kernels.gated_decay import (
    gated_decay_read_kernel,
    gated_decay_write_kernel,
    square,
    tiles,
)
from effattn_lite.kernels.gated_decay_gradient import gated_decay_gradient_kernel
from effattn_lite.kernels.gated_decay_step import gated_decay_step_kernel

ROUND = 64
"""A segment is a multiple of this many tokens."""


class Launcher:
    """One call's sizes and flags, and its kernels."""

    def __init__(self, q, k, v, g, u, h0, cu_seqlens, chunk_size):
        self.B, self.T, queries, self.K = q.shape
        self.H, self.V = v.shape[2:]
        self.group = self.H // queries
        self.dtype, self.device = q.dtype, q.device
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.g = g.float().contiguous()
        self.u = u.float().contiguous() if u is not None else None
        self.h0 = h0.contiguous() if h0 is not None else None
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.channel, self.packed = g.ndim == 4, cu_seqlens is not None
        self.N = cu_seqlens.numel() - 1 if self.packed else self.B
        how = dict(channel=self.channel, capability=capability(q) or 80)
        self.narrow, self.spread = tiles(self.K, self.V, self.dtype, chunk_size=chunk_size, **how)
        self.square = square(self.K, self.V, self.dtype, **how)
        self.cut(4 * processors(q))

    def cut(self, programs):
        """Choose L, so that the grid has about that many programs, and no sequence more than 64 segments."""
        columns = cdiv(max(self.K, self.V), 64) * self.H
        tokens = max(cdiv(self.B * self.T * columns, programs), cdiv(self.T, 64))
        self.L = ROUND * cdiv(tokens, ROUND)
        self.segmented = self.T > self.L
        # packed, a sequence may end anywhere: every one may have a segment that is not full
        self.segments = self.T // self.L + self.N if self.packed else self.B * cdiv(self.T, self.L)

    def sizes(self):
        """Arguments that all kernels share."""
        return dict(
            T=self.T, L=self.L, N=self.N, H=self.H, GROUP=self.group, K=self.K, V=self.V, PACKED=self.packed,
            BS=power_of_2(self.N) if self.packed else 1, CHANNEL=self.channel, BONUS=int(self.u is not None),
        )  # fmt: skip

    def wide(self, *shape):
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def write(self, y, v, *, scale, reverse):
        """What every segment writes, [segments, H, K, V], and its log decay; None where one is enough."""
        if not self.segmented:
            return None, None
        out = self.wide(self.segments, self.H, self.K, self.V)
        totals = self.wide(self.segments, self.H, self.K if self.channel else 1)
        C, BK, BV, options = self.square
        grid = self.segments * self.H * cdiv(self.K, BK) * cdiv(self.V, BV)
        gated_decay_write_kernel[(grid,)](
            y, v, self.g, out, totals, self.cu_seqlens, scale, C=C, BK=BK, BV=BV, REVERSE=reverse,
            **self.sizes(), **options,
        )  # fmt: skip
        return out, totals

    def read(self, x, y, v, *, h0, left, read_scale=1.0, write_scale=1.0, reverse=False, ht=None):
        """A linear attention of readers x, writers y and values v; reversed, also every chunk's state."""
        o, states = torch.empty_like(v), None
        C, BV, options = self.narrow
        if reverse:
            C = self.spread[0]
            shape = (self.segments, self.L // C, self.H, self.K, self.V)
            kind = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
            states = torch.empty(shape, dtype=kind, device=self.device)
        gated_decay_read_kernel[(self.segments * self.H * cdiv(self.V, BV),)](
            x, y, v, self.g, self.u, h0, *left, o, ht, states, self.cu_seqlens, read_scale, write_scale,
            C=C, BK=padded(self.K), BV=BV, REVERSE=reverse, HAS_H0=h0 is not None,
            SEGMENTS=left[0] is not None, STORE_HT=ht is not None, **self.sizes(), **options,
        )  # fmt: skip
        return o, states

    def gradient(self, do, states, *, left, scale):
        """dq, dk, dg, du; the first two in the dtype of q, unless value heads share them."""
        C, BK, options = self.spread
        NK, shape = cdiv(self.K, BK), (self.B, self.T, self.H)
        narrow = self.dtype if self.group == 1 else torch.float32
        dq, dk = (torch.empty(*shape, self.K, dtype=narrow, device=self.device) for _ in range(2))
        dg = self.wide(*shape, self.K if self.channel else NK)
        # packed, the last programs may have no segment: their sums are 0
        du = None if self.u is None else torch.zeros(self.segments, *self.u.shape, device=self.device)
        gated_decay_gradient_kernel[(self.segments * self.H * NK,)](
            self.q, self.k, self.v, do, self.g, self.u, self.h0, *left, states, dq, dk, dg, du,
            self.cu_seqlens, scale, C=C, BK=BK, BV=padded(self.V), HAS_H0=self.h0 is not None,
            SEGMENTS=left[0] is not None, **self.sizes(), **options,
        )  # fmt: skip
        if self.group > 1:
            dq, dk = (x.unflatten(2, (-1, self.group)).sum(3).to(self.dtype) for x in (dq, dk))
        return dq, dk, (dg if self.channel else dg.sum(-1)), (None if du is None else du.sum(0))


def forward(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    """o and the final state (empty unless asked for)."""
    with on_device(q):
        run = Launcher(q, k, v, g, u, initial_state, cu_seqlens, chunk_size)
        ht = run.wide(run.N, run.H, run.K, run.V) if output_final_state else None
        left = run.write(run.k, run.v, scale=1.0, reverse=False)
        o, _ = run.read(run.q, run.k, run.v, h0=run.h0, left=left, read_scale=scale, ht=ht)
    return o, (ht if output_final_state else q.new_empty(0, dtype=torch.float32))


def backward(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size):
    """Gradients of q, k, v, g, u and the initial state; nothing of the forward is kept but its inputs."""
    with on_device(q):
        run = Launcher(q, k, v, g, u, initial_state, cu_seqlens, chunk_size)
        do, dht = do.contiguous(), dht.contiguous() if dht is not None else None
        dh0 = run.wide(run.N, run.H, run.K, run.V) if initial_state is not None else None
        left = run.write(run.k, run.v, scale=1.0, reverse=False)
        right = run.write(run.q, do, scale=scale, reverse=True)
        dv, states = run.read(run.k, run.q, do, h0=dht, left=right, write_scale=scale, reverse=True, ht=dh0)
        dq, dk, dg, du = run.gradient(do, states, left=left, scale=scale)
    none = q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, dg, (none if du is None else du), (none if dh0 is None else dh0)


def step(q, k, v, g, u, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        K, (N, H, V) = q.shape[-1], v.shape
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        BV = 16
        gated_decay_step_kernel[(N * H * cdiv(V, BV),)](
            q.contiguous(), k.contiguous(), v.contiguous(), g.float().contiguous(),
            u.float().contiguous() if u is not None else None, state, o, out_state, scale,
            H=H, GROUP=H // q.shape[1], K=K, V=V, BK=padded(K), BV=BV, CHANNEL=g.ndim == 3,
            BONUS=u is not None, num_warps=4,
        )  # fmt: skip
    return o
