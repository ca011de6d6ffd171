"""Launches of the fixed-decay engine: segments from the size of the chip, roles of the backward."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2, processors
from effattn_lite.kernels.decay import decay_read_kernel, decay_write_kernel, square, tiles
from effattn_lite.kernels.decay_constants import decay_constants_kernel
from effattn_lite.kernels.decay_step import decay_step_kernel

ROUND = 64
"""A segment is a multiple of this many tokens."""


class Launcher:
    """One call's sizes and flags, and its four kernels."""

    def __init__(self, q, k, v, g, u, h0, cu_seqlens, chunk_size):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.dtype, self.device, self.chunk_size = q.dtype, q.device, chunk_size
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.g = g.float().contiguous()
        self.u = u.float().contiguous() if u is not None else None
        self.h0 = h0.contiguous() if h0 is not None else None
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.channel, self.bonus, self.packed = g.ndim == 2, u is not None, cu_seqlens is not None
        self.N = cu_seqlens.numel() - 1 if self.packed else self.B
        self.capability = capability(q) or 80
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
        BS = power_of_2(self.N) if self.packed else 1
        return dict(T=self.T, L=self.L, N=self.N, H=self.H, BS=BS, PACKED=self.packed)

    def state(self):
        """An empty state of every sequence."""
        return torch.empty(self.N, self.H, self.K, self.V, dtype=torch.float32, device=self.device)

    def write(self, k, v, *, scale, reverse):
        """What every segment writes, [segments, H, K, V], or None where one segment is the whole sequence."""
        if not self.segmented:
            return None
        out = torch.empty(self.segments, self.H, self.K, self.V, dtype=torch.float32, device=self.device)
        C, BK, BV, options = square(
            self.K, self.V, self.dtype, channel=self.channel, capability=self.capability
        )
        grid = self.segments * self.H * cdiv(self.K, BK) * cdiv(self.V, BV)
        decay_write_kernel[(grid,)](
            k, v, self.g, out, self.cu_seqlens, scale, K=self.K, V=self.V, C=C, BK=BK, BV=BV, **self.sizes(),
            CHANNEL=self.channel, WRITE=int(reverse and not self.bonus), REVERSE=reverse, **options,
        )  # fmt: skip
        return out

    def read(
        self, q, k, v, *, h0, segments, read_scale=1.0, write_scale=1.0, columns=False, reverse=False, ht=None
    ):
        """A linear attention of the roles q, k and v; see the table in `kernels/decay.py`."""
        K, V = k.shape[-1], v.shape[-1]
        o = torch.empty_like(v)
        C, BK, BV, options = tiles(
            K, self.dtype, channel=self.channel, capability=self.capability, chunk_size=self.chunk_size
        )
        BV = min(BV, padded(V))
        decay_read_kernel[(self.segments * self.H * cdiv(V, BV),)](
            q, k, v, self.g, self.u, h0, segments, o, ht, self.cu_seqlens, read_scale, write_scale,
            K=K, V=V, C=C, BK=BK, BV=BV, **self.sizes(), SK=1 if columns else V, SV=K if columns else 1,
            DECAY=1 + columns if self.channel else 0, READ=int(not reverse and not self.bonus),
            WRITE=int(reverse and not self.bonus), BONUS=self.bonus, REVERSE=reverse, HAS_H0=h0 is not None,
            SEGMENTS=segments is not None, STORE_HT=ht is not None, **options,
        )  # fmt: skip
        return o

    def constants(self, do, *, dht, segments, dsegments, scale):
        """Gradients of g and u, float32."""
        C, BK, BV, options = square(
            self.K, self.V, self.dtype, channel=self.channel, capability=self.capability
        )
        NV = cdiv(self.V, BV)
        # packed, the last programs may have no segment: their sums are 0
        dg, du = torch.zeros(2, self.segments, NV, self.H, self.K, device=self.device)
        decay_constants_kernel[(self.segments * self.H * cdiv(self.K, BK) * NV,)](
            self.q, self.k, self.v, do, self.g, self.h0, dht, segments, dsegments, dg, du, self.cu_seqlens,
            scale, K=self.K, V=self.V, C=C, BK=BK, BV=BV, **self.sizes(), CHANNEL=self.channel,
            READ=int(not self.bonus), BONUS=self.bonus, HAS_H0=self.h0 is not None, HAS_DHT=dht is not None,
            SEGMENTS=segments is not None, **options,
        )  # fmt: skip
        dg, du = dg.sum((0, 1)), du.sum((0, 1))
        return (dg if self.channel else dg.sum(-1)), du


def forward(q, k, v, g, u, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    """o and the final state (empty unless asked for)."""
    with on_device(q):
        run = Launcher(q, k, v, g, u, initial_state, cu_seqlens, chunk_size)
        ht = run.state() if output_final_state else None
        segments = run.write(run.k, run.v, scale=1.0, reverse=False)
        o = run.read(run.q, run.k, run.v, h0=run.h0, segments=segments, read_scale=scale, ht=ht)
    return o, (ht if output_final_state else q.new_empty(0, dtype=torch.float32))


def backward(do, dht, q, k, v, g, u, initial_state, cu_seqlens, scale, chunk_size, constants):
    """Gradients of q, k, v, g, u and the initial state; nothing of the forward is kept but its inputs."""
    with on_device(q):
        run = Launcher(q, k, v, g, u, initial_state, cu_seqlens, chunk_size)
        do, dht = do.contiguous(), dht.contiguous() if dht is not None else None
        segments = run.write(run.k, run.v, scale=1.0, reverse=False)
        dsegments = run.write(run.q, do, scale=scale, reverse=True)
        right = dict(h0=dht, segments=dsegments, write_scale=scale, reverse=True)
        dh0 = run.state() if initial_state is not None else None
        dv = run.read(run.k, run.q, do, **right, ht=dh0)
        dk = run.read(run.v, do, run.q, **right, columns=True)
        dq = run.read(do, run.v, run.k, h0=run.h0, segments=segments, read_scale=scale, columns=True)
        dg, du = torch.zeros_like(run.g), torch.zeros_like(run.u) if u is not None else None
        if constants:
            dg, du = run.constants(do, dht=dht, segments=segments, dsegments=dsegments, scale=scale)
    none = q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, dg, (none if u is None else du), (none if dh0 is None else dh0)


def step(q, k, v, g, u, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        N, H, K = q.shape
        V = v.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        BK, BV = padded(K), 16
        decay_step_kernel[(N * H * cdiv(V, BV),)](
            q.contiguous(), k.contiguous(), v.contiguous(), g.float().contiguous(),
            u.float().contiguous() if u is not None else None, state, o, out_state, scale,
            H=H, K=K, V=V, BK=BK, BV=BV, CHANNEL=g.ndim == 2, BONUS=u is not None, num_warps=4,
        )  # fmt: skip
    return o
