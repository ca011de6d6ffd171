"""Launches of the dplr engine: what is kept between its kernels, and their grids."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2
from effattn_lite.kernels.delta import work
from effattn_lite.kernels.dplr import dplr_states_kernel, square, tiles
from effattn_lite.kernels.dplr_local import dplr_gradients_kernel
from effattn_lite.kernels.dplr_prepare import dplr_prepare_kernel
from effattn_lite.kernels.dplr_step import dplr_step_kernel


class Launcher:
    """One call's sizes and flags, and its kernels; `reverse` runs them from the right."""

    def __init__(self, q, v, g, cu_seqlens, chunk_size):
        B, T, H, K = q.shape
        V = v.shape[-1]
        self.g, self.device = g.contiguous(), q.device
        self.N = cu_seqlens.numel() - 1 if cu_seqlens is not None else B
        card = capability(q) or 80
        self.dtype, self.precision = work(q.dtype, card)
        HC, BK, BV, self.tall_options = tiles(K, q.dtype, capability=card, chunk_size=chunk_size)
        EK, LK, EV, self.flat_options = square(K, V, q.dtype, capability=card)
        C = 2 * HC
        # packed, a sequence may end anywhere: every one may have a chunk that is not full
        chunks = B * cdiv(T, C) if cu_seqlens is None else T // C + self.N
        both = dict(T=T, N=self.N, H=H, K=K, V=V, PACKED=cu_seqlens is not None)
        both |= dict(cu_seqlens=cu_seqlens.contiguous() if cu_seqlens is not None else None)
        both |= dict(BS=power_of_2(self.N) if cu_seqlens is not None else 1)
        BV = min(BV, padded(V))
        self.tall = both | dict(C=C, BK=BK, BV=BV, HALF=q.dtype == torch.float16) | self.tall_options
        self.flat = both | dict(HC=HC, BK=EK, BV=EV, PRECISION=self.precision) | self.flat_options
        self.near = self.flat | dict(BK=LK)
        self.tall_grid, self.flat_grid = (self.N * H * cdiv(V, BV),), (chunks * H,)
        self.near_grid = (chunks * H * cdiv(K, LK),)
        self.tokens, self.chunks, self.K, self.V = (B, T, H), (chunks, H), K, V

    def empty(self, *shape, dtype=None):
        """An empty tensor, in the dtype of what kernels hand to one another."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def state(self):
        """An empty state of every sequence."""
        return self.empty(self.N, self.tokens[2], self.K, self.V, dtype=torch.float32)

    def states(self):
        """An empty state of every chunk."""
        return self.empty(*self.chunks, self.K, self.V)

    def prepare(self, x1, x2, y1, y2, v, *, reverse=False, output=True):
        """What no state is asked for: w1, w2, u1, u2, z1, z2 and the chunks' decays."""
        w1, z1, z2 = (self.empty(*self.tokens, self.K) for _ in range(3))
        u1 = self.empty(*self.tokens, self.V)
        w2, u2 = (torch.empty_like(w1), torch.empty_like(u1)) if output else (None, None)
        total = self.empty(*self.chunks, self.K, dtype=torch.float32)
        dplr_prepare_kernel[self.flat_grid](
            x1, x2, y1, y2, v, self.g, w1, w2, u1, u2, z1, z2, total, **self.flat, REVERSE=reverse,
            OUTPUT=output,
        )  # fmt: skip
        return w1, w2, u1, u2, z1, z2, v, total

    def run(self, prepared, s0, *, o=None, st=None, h=None, y=None, scale=1.0, reverse=False):
        """Through the text: the second read-out o, the last state; every chunk's state and y, the first."""
        dplr_states_kernel[self.tall_grid](
            *prepared, s0, o, st, h, y, scale=scale, **self.tall, REVERSE=reverse, HAS_S0=s0 is not None,
            OUTPUT=o is not None, STATES=h is not None, STORE_ST=st is not None,
        )  # fmt: skip

    def gradients(self, x, y, e, d, S, other, reads, dg, *, reverse=False):
        """Gradients of the readers x1 and x2; from the right dg as well."""
        dx1, dx2 = (torch.empty_like(t) for t in x)
        dplr_gradients_kernel[self.near_grid](
            *x, *y, *e, *d, self.g, S, other, dx1, dx2, *reads, dg, **self.near, REVERSE=reverse
        )
        return dx1, dx2


def forward(q, k, v, g, a, b, initial_state, cu_seqlens, scale, output_final_state, chunk_size):
    """o and the final state (empty unless asked for)."""
    with on_device(q):
        run = Launcher(q, v, g, cu_seqlens, chunk_size)
        q, k, v, a, b = (x.contiguous() for x in (q, k, v, a, b))
        h0 = initial_state.contiguous() if initial_state is not None else None
        o, ht = torch.empty_like(v), run.state() if output_final_state else None
        run.run(run.prepare(a, q, b, k, v), h0, o=o, st=ht, scale=scale)
    return o, (ht if output_final_state else q.new_empty(0, dtype=torch.float32))


def backward(do, dht, q, k, v, g, a, b, initial_state, cu_seqlens, scale, chunk_size):
    """Gradients of q, k, v, g, a, b and the initial state; nothing of the forward is kept but its inputs."""
    with on_device(q):
        run = Launcher(q, v, g, cu_seqlens, chunk_size)
        q, k, v, a, b = (x.contiguous() for x in (q, k, v, a, b))
        # the scale belongs to the output alone
        do = (do if scale == 1 else do * scale).contiguous()
        h0, dht = (x.contiguous() if x is not None else None for x in (initial_state, dht))
        h, dh, y, r = run.states(), run.states(), run.empty(*v.shape), run.empty(*v.shape)
        dv, dg, dh0 = torch.empty_like(v), torch.empty_like(run.g), None if h0 is None else run.state()
        run.run(run.prepare(a, q, b, k, v, output=False), h0, h=h, y=y)
        right = run.prepare(b, k, a, q, do, reverse=True)
        run.run(right, dht, o=dv, st=dh0, h=dh, y=r, reverse=True)
        reads = [run.empty(*q.shape, dtype=torch.float32) for _ in range(2)]
        da, dq = run.gradients((a, q), (b, k), (r, do), (y, v), h, None, reads, None)
        db, dk = run.gradients((b, k), (a, q), (y, v), (r, do), dh, h, reads, dg, reverse=True)
    return dq, dk, dv, dg, da, db, (q.new_empty(0, dtype=torch.float32) if dh0 is None else dh0)


def step(q, k, v, g, a, b, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        N, H, K = q.shape
        V = v.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        BK, BV = padded(K), 16
        dplr_step_kernel[(N * H * cdiv(V, BV),)](
            *(x.contiguous() for x in (q, k, v, g, a, b)), state, o, out_state, scale, K=K, V=V, BK=BK, BV=BV,
            num_warps=4,
        )  # fmt: skip
    return o
