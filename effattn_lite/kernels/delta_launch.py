"""Launches of the delta engine: what is kept between its kernels, and their grids."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2
from effattn_lite.kernels.delta import delta_gradients_kernel, delta_states_kernel, square, tiles, work
from effattn_lite.kernels.delta_local import delta_columns_kernel, delta_rows_kernel
from effattn_lite.kernels.delta_prepare import delta_prepare_kernel, delta_prepare_right_kernel
from effattn_lite.kernels.delta_step import delta_step_kernel


class Launcher:
    """One call's sizes and flags, and its kernels."""

    def __init__(self, q, k, v, g, beta, h0, cu_seqlens, chunk_size):
        B, T, H, K = q.shape
        HV, V = v.shape[2:]
        self.q, self.k, self.v, self.beta = (x.contiguous() for x in (q, k, v, beta))
        self.g = g.contiguous() if g is not None else None
        self.h0 = h0.contiguous() if h0 is not None else None
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.gate = 0 if g is None else g.ndim - 2
        self.N = cu_seqlens.numel() - 1 if cu_seqlens is not None else B
        card = capability(q) or 80
        self.dtype, self.precision = work(q.dtype, card)
        HC, BK, BV, self.left, self.right = tiles(
            K, q.dtype, gate=self.gate, capability=card, chunk_size=chunk_size
        )
        EK, EV, self.plain, self.inner = square(K, V, q.dtype, capability=card)
        C = 2 * HC
        # packed, a sequence may end anywhere: every one may have a chunk that is not full
        self.chunks = B * cdiv(T, C) if cu_seqlens is None else T // C + self.N
        BS = power_of_2(self.N) if cu_seqlens is not None else 1
        both = dict(cu_seqlens=self.cu_seqlens, T=T, N=self.N, HV=HV, K=K, V=V, BS=BS, GATE=self.gate)
        both |= dict(PACKED=cu_seqlens is not None)
        BV = min(BV, padded(V))
        self.tall = both | dict(C=C, BK=BK, BV=BV, HALF=q.dtype == torch.float16)
        self.flat = both | dict(H=H, HC=HC, BK=EK, BV=EV)
        self.tall_grid, self.flat_grid = (self.N * HV * cdiv(V, BV),), (self.chunks * HV,)
        self.rows, self.HV, self.K, self.V, self.C = (B, T), HV, K, V, C

    def scratch(self, *axes, dtype=None):
        """An empty tensor a token and value head; `axes` are its last ones."""
        return torch.empty(*self.rows, self.HV, *axes, dtype=dtype or self.dtype, device=self.q.device)

    def state(self):
        """An empty state of every sequence."""
        return torch.empty(self.N, self.HV, self.K, self.V, dtype=torch.float32, device=self.q.device)

    def prepare(self, *, scores):
        """What no state is asked for: w, u, p, the decays, and the queries and keys that meet a state."""
        w, u = self.scratch(self.K), self.scratch(self.V)
        p = self.scratch(self.C) if scores else None
        q, k, total = self.q, self.k, None
        if self.gate == 1:
            total = self.scratch(dtype=torch.float32)
        if self.gate == 2:
            q, k = self.scratch(self.K), self.scratch(self.K)
            shape = self.chunks, self.HV, self.K
            total = torch.empty(shape, dtype=torch.float32, device=q.device)
        delta_prepare_kernel[self.flat_grid](
            self.q, self.k, self.v, self.g, self.beta, w, u, p, q, k, total, **self.flat,
            SCORES=scores, PRECISION=self.precision, **self.plain,
        )  # fmt: skip
        return w, u, p, q, k, total

    def prepare_right(self, do, scale):
        """The same of the backward: w, u, and the keys that meet a state's gradient."""
        w, u = self.scratch(self.K), self.scratch(self.V)
        k = self.scratch(self.K) if self.gate == 2 else self.k
        delta_prepare_right_kernel[self.flat_grid](
            self.q, self.k, self.g, self.beta, do, w, u, k, scale=scale, **self.flat,
            PRECISION=self.precision, **self.plain,
        )  # fmt: skip
        return w, u, k

    def states(self, w, u, p, q, k, total, *, o=None, ht=None, h=None, d=None, scale=1.0):
        """From the left: o and the last state, or the states of all chunks and what is written."""
        delta_states_kernel[self.tall_grid](
            q, k, w, u, p, total, self.h0, o, ht, h, d, scale=scale, HQ=q.shape[2], **self.tall,
            HAS_H0=self.h0 is not None, OUTPUT=o is not None, STORE_HT=ht is not None, **self.left,
        )  # fmt: skip

    def gradients(self, w, u, q, k, total, do, dht, dh0, dh, r, scale):
        """From the right: the gradients that enter all chunks, and what each token is told."""
        delta_gradients_kernel[self.tall_grid](
            q, k, self.beta, do, w, u, total, dht, dh0, dh, r, scale=scale, HQ=q.shape[2], **self.tall,
            HAS_DHT=dht is not None, STORE_DH0=dh0 is not None, **self.right,
        )  # fmt: skip

    def local(self, do, h, dh, d, r, scale):
        """Gradients of q, k, v, g and beta."""
        shared = self.q.shape[2] < self.HV
        kind = torch.float32 if shared else self.q.dtype
        dq, dk = self.scratch(self.K, dtype=kind), self.scratch(self.K, dtype=kind)
        dv, dbeta = torch.empty_like(self.v), torch.empty_like(self.beta)
        dg = torch.empty_like(self.g) if self.gate else self.q.new_empty(0, dtype=torch.float32)
        z, own = self.scratch(self.K, dtype=torch.float32), self.scratch(dtype=torch.float32)
        reads = torch.empty_like(self.g, dtype=torch.float32) if self.gate else None
        delta_rows_kernel[self.flat_grid](
            self.q, self.k, self.v, self.g, self.beta, do, h, d, r, dq, z, dv, dbeta, reads, own, scale=scale,
            **self.flat, **self.inner,
        )  # fmt: skip
        delta_columns_kernel[self.flat_grid](
            self.q, self.k, self.g, self.beta, do, h, dh, d, r, z, reads, own, dk, dg, scale=scale,
            **self.flat, PRECISION=self.precision, **self.inner,
        )  # fmt: skip
        if shared:
            # value heads that share a query and a key
            H = self.q.shape[2]
            dq, dk = (x.unflatten(2, (H, -1)).sum(3).to(self.q.dtype) for x in (dq, dk))
        return dq, dk, dv, dg, dbeta


def forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    """o and the final state (empty unless asked for)."""
    with on_device(q):
        run = Launcher(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)
        o, ht = torch.empty_like(run.v), run.state() if output_final_state else None
        run.states(*run.prepare(scores=True), o=o, ht=ht, scale=scale)
    return o, (ht if output_final_state else q.new_empty(0, dtype=torch.float32))


def backward(do, dht, q, k, v, g, beta, initial_state, cu_seqlens, scale, chunk_size):
    """Gradients of q, k, v, g, beta and the initial state; nothing of the forward is kept but its inputs."""
    with on_device(q):
        run = Launcher(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)
        do, dht = do.contiguous(), dht.contiguous() if dht is not None else None
        shape = run.chunks, run.HV, run.K, run.V
        h, dh = torch.empty(2, *shape, dtype=run.dtype, device=q.device)
        d, r = run.scratch(run.V), run.scratch(run.V)
        dh0 = run.state() if initial_state is not None else None
        w, u, p, qx, kz, total = run.prepare(scores=False)
        run.states(w, u, p, qx, kz, total, h=h, d=d)
        w, u, kx = run.prepare_right(do, scale)
        run.gradients(w, u, qx, kx, total, do, dht, dh0, dh, r, scale)
        dq, dk, dv, dg, dbeta = run.local(do, h, dh, d, r, scale)
    return dq, dk, dv, dg, dbeta, (q.new_empty(0, dtype=torch.float32) if dh0 is None else dh0)


def step(q, k, v, g, beta, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        N, H, K = q.shape
        HV, V = v.shape[1:]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        BK, BV = padded(K), 16
        delta_step_kernel[(N * HV * cdiv(V, BV),)](
            q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous() if g is not None else None,
            beta.contiguous(), state, o, out_state, scale, H=H, HV=HV, K=K, V=V, BK=BK, BV=BV,
            GATE=0 if g is None else g.ndim - 1, num_warps=4,
        )  # fmt: skip
    return o
