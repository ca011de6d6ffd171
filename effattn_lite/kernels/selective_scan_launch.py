"""Launches of the selective scan: segments from the size of the chip, shares of gradients added up."""

import torch

from effattn_lite.kernels.common.launch import cdiv, on_device, power_of_2, processors
from effattn_lite.kernels.selective_scan import (
    CHUNK,
    UNROLL,
    selective_scan_read_kernel,
    selective_scan_write_kernel,
    tiles,
)
from effattn_lite.kernels.selective_scan_gradient import selective_scan_gradient_kernel
from effattn_lite.kernels.selective_scan_step import selective_scan_step_kernel

ROUND = 64
"""A segment is a multiple of this many tokens, and so of a chunk."""

WARPS = 16
"""Warps a multiprocessor should have: a token's loads take as long as the arithmetic of several."""


class Launcher:
    """One call's sizes and flags, and its kernels."""

    def __init__(self, q, k, v, w, A, D, h0, cu_seqlens, *, gradient=False):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.q, self.k, self.v, self.w = (x.contiguous() for x in (q, k, v, w))
        self.A, self.D = _rates(A), None if D is None else D.float().contiguous()
        self.h0, self.cu_seqlens = (None if x is None else x.contiguous() for x in (h0, cu_seqlens))
        self.packed = cu_seqlens is not None
        self.N = cu_seqlens.numel() - 1 if self.packed else self.B
        self.BK, self.BV, self.options = tiles(self.K, self.V, gradient=gradient)
        self.NV = cdiv(self.V, self.BV)
        self.cut(cdiv(WARPS * processors(q), self.options["num_warps"]))

    def cut(self, programs):
        """Choose L, so that the grid has about that many programs, and no sequence more than 64 segments."""
        tokens = max(cdiv(self.B * self.T * self.H * self.NV, programs), cdiv(self.T, 64))
        self.L = ROUND * cdiv(tokens, ROUND)
        self.segmented = self.T > self.L
        # packed, a sequence may end anywhere: every one may have a segment that is not full
        self.segments = self.T // self.L + self.N if self.packed else self.B * cdiv(self.T, self.L)
        self.programs = self.segments * self.H * self.NV

    def sizes(self):
        """Arguments that all kernels but the step share."""
        BS = power_of_2(self.N) if self.packed else 1
        return dict(
            cu_seqlens=self.cu_seqlens, T=self.T, L=self.L, N=self.N, H=self.H, K=self.K, V=self.V,
            BK=self.BK, BV=self.BV, BS=BS, RATED=self.A is not None, PACKED=self.packed, **self.options,
        )  # fmt: skip

    def wide(self, *shape):
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def state(self):
        """An empty state of every sequence, in the layout of the op."""
        last = (self.K, self.V) if self.A is None else (self.V, self.K)
        return self.wide(self.N, self.H, *last)

    def write(self, do=None, scale=1.0):
        """Products of factors, writes, and with `do` writes to the gradient, [segments, H, K, V] each.

        Three times None where one segment is the whole sequence.
        """
        if not self.segmented:
            return None, None, None
        products, segments = self.wide(2, self.segments, self.H, self.K, self.V)
        dsegments = torch.empty_like(segments) if do is not None else None
        selective_scan_write_kernel[(self.programs,)](
            self.q, self.k, self.v, self.w, do, self.A, products, segments, dsegments, scale=scale, U=UNROLL,
            GRADIENT=do is not None, **self.sizes(),
        )  # fmt: skip
        return products, segments, dsegments

    def shares(self, x):
        """An empty tensor for the gradient of x = q or k, a share a tile: x's own kind where it is one."""
        return torch.empty_like(x)[None] if self.NV == 1 else self.wide(self.NV, *x.shape)


def forward(q, k, v, w, A, D, initial_state, cu_seqlens, scale, output_final_state):
    """o and the final state (empty unless asked for)."""
    with on_device(q):
        run = Launcher(q, k, v, w, A, D, initial_state, cu_seqlens)
        o, ht = torch.empty_like(run.v), run.state() if output_final_state else None
        products, segments, _ = run.write()
        selective_scan_read_kernel[(run.programs,)](
            run.q, run.k, run.v, run.w, run.A, run.D, run.h0, products, segments, o, ht, scale=scale,
            U=UNROLL, SKIP=D is not None, HAS_H0=run.h0 is not None, SEGMENTS=run.segmented,
            STORE_HT=ht is not None, **run.sizes(),
        )  # fmt: skip
    return o, (ht if output_final_state else q.new_empty(0, dtype=torch.float32))


def backward(do, dht, q, k, v, w, A, D, initial_state, cu_seqlens, scale):
    """Gradients of q, k, v, w, A, D and the initial state; nothing of the forward is kept but its inputs."""
    with on_device(q):
        run = Launcher(q, k, v, w, A, D, initial_state, cu_seqlens, gradient=True)
        do, dht = do.contiguous(), dht.contiguous() if dht is not None else None
        products, segments, dsegments = run.write(do, scale)
        checkpoints = run.wide(run.programs, run.L // CHUNK, run.BK, run.BV)
        states = run.wide(run.programs, CHUNK, run.BK, run.BV)
        dq, dk = run.shares(run.q), run.shares(run.k)
        dv, dw = torch.empty_like(run.v), torch.empty_like(run.w)
        dh0 = run.state() if initial_state is not None else None
        # packed, the last programs may have no segment: their shares are 0
        zeros = dict(dtype=torch.float32, device=q.device)
        dA = None if A is None else torch.zeros(run.segments, run.K, run.V, **zeros)
        dD = None if D is None else torch.zeros(run.segments, run.V, **zeros)
        selective_scan_gradient_kernel[(run.programs,)](
            run.q, run.k, run.v, run.w, do, run.A, run.D, run.h0, dht, products, segments, dsegments,
            checkpoints, states, dq, dk, dv, dw, dA, dD, dh0, scale=scale, C=CHUNK, SKIP=D is not None,
            HAS_H0=run.h0 is not None, HAS_DHT=dht is not None, SEGMENTS=run.segmented,
            STORE_DH0=dh0 is not None, **run.sizes(),
        )  # fmt: skip
    dq, dk = (x[0] if run.NV == 1 else x.sum(0).to(q.dtype) for x in (dq, dk))
    dA = q.new_empty(0, dtype=torch.float32) if A is None else dA.sum(0).mT.contiguous()
    dD = q.new_empty(0, dtype=torch.float32) if D is None else dD.sum(0)
    dh0 = q.new_empty(0, dtype=torch.float32) if dh0 is None else dh0
    return dq, dk, dv, dw, dA, dD, dh0


def step(q, k, v, w, A, D, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        N, H, K = q.shape
        V = v.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        BK, BV, options = tiles(K, V)
        selective_scan_step_kernel[(N * H * cdiv(V, BV),)](
            *(x.contiguous() for x in (q, k, v, w)),
            _rates(A), None if D is None else D.float().contiguous(),
            state, o, out_state, scale, H=H, K=K, V=V, BK=BK, BV=BV, RATED=A is not None, SKIP=D is not None,
            **options,
        )  # fmt: skip
    return o


def _rates(A):
    # channels next to each other, as a tile wants them
    return None if A is None else A.float().mT.contiguous()  # [K, V]
