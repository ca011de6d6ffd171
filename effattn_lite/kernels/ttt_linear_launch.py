"""Launches of the TTT-Linear engine: one program a sequence and head."""

import torch

from effattn_lite.kernels.common.launch import on_device, padded
from effattn_lite.kernels.ttt_linear import tiles, ttt_linear_forward_kernel
from effattn_lite.kernels.ttt_linear_backward import ttt_linear_backward_kernel


class Launcher:
    """One call's sizes and flags."""

    def __init__(self, q, k, v, eta, cu_seqlens, batch_size, every):
        self.B, self.T, self.H, self.K = q.shape
        self.device, self.size = q.device, batch_size
        self.q, self.k, self.v, self.eta = q.contiguous(), k.contiguous(), v.contiguous(), wide(eta)
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.N = self.B if cu_seqlens is None else cu_seqlens.numel() - 1
        self.every = every

    def empty(self, *shape):
        """A float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def model(self, *first):
        """Weights and biases of inner models, [*first, H, K, K] and [*first, H, K]."""
        return self.empty(*first, self.H, self.K, self.K), self.empty(*first, self.H, self.K)

    def sizes(self):
        """Arguments that both kernels share."""
        BK, warps = tiles(self.q.dtype)
        return dict(
            T=self.T, N=self.N, every=self.every, H=self.H, K=self.K, SIZE=self.size, BT=padded(self.size),
            BK=BK, PACKED=self.cu_seqlens is not None, num_warps=warps, num_stages=1,
        )  # fmt: skip


def wide(x):
    """x in float32, contiguous; None stays None."""
    return None if x is None else x.float().contiguous()


def forward(q, k, v, inner, eta, state, count, cu_seqlens, batch_size, every, output_final_state, slots):
    """o, the final (S, s, D, d), and the models kept for the backward; empty unless asked for.

    inner: w, b, ln_weight, ln_bias; state: S, s, D, d or Nones; count: int32 [N] or None; slots: how many
    models are kept, one of `every` a text, and room for texts that begin anywhere.
    """
    with on_device(q):
        run = Launcher(q, k, v, eta, cu_seqlens, batch_size, every)
        o = torch.empty_like(run.v)
        final = (*run.model(run.N), *run.model(run.N)) if output_final_state else (None,) * 4
        kept = (None, None)
        if slots:
            # slots that no text owns must hold numbers too
            kept = tuple(x.zero_() for x in run.model(slots))
        ttt_linear_forward_kernel[(run.N * run.H,)](
            run.q, run.k, run.v, run.eta, *map(wide, inner), *map(wide, state), count, o, *final, *kept,
            run.cu_seqlens, **run.sizes(), HAS_H0=count is not None, KEEP=slots > 0,
            STORE_HT=output_final_state,
        )  # fmt: skip
    return o, *(q.new_empty(0, dtype=torch.float32) if x is None else x for x in (*final, *kept))


def backward(do, final, q, k, v, inner, eta, state, count, cu_seqlens, batch_size, every, kept):
    """Gradients of q, k, v, w, b, eta, ln_weight, ln_bias and the initial (S, s, D, d).

    final: gradients of the final (S, s, D, d), or Nones.
    """
    with on_device(q):
        run = Launcher(q, k, v, eta, cu_seqlens, batch_size, every)
        N, H, K = run.N, run.H, run.K
        made = run.empty(N, H, run.every, K, K), run.empty(N, H, run.every, K)
        dq, dk, dv = (torch.empty_like(x) for x in (run.q, run.k, run.v))
        deta, norms = run.empty(*eta.shape), (run.empty(N, H, K), run.empty(N, H, K))
        begin = run.model(N)
        recent = run.model(N) if count is not None else (None, None)
        ttt_linear_backward_kernel[(N * H,)](
            run.q, run.k, run.v, run.eta, *map(wide, inner[2:]), *map(wide, state[2:]), count,
            do.contiguous(), *map(wide, final), *kept, *made, dq, dk, dv, deta, *norms, *begin, *recent,
            run.cu_seqlens, **run.sizes(), HAS_H0=count is not None, HAS_DHT=final[0] is not None,
        )  # fmt: skip
    dw, db, dln_weight, dln_bias = (x.sum(0) for x in (*begin, *norms))
    if final[0] is not None:
        # the state counts from (w, b)
        dw, db = dw - final[0].sum(0), db - final[1].sum(0)
    dstate = (*begin, *recent) if count is not None else (q.new_empty(0, dtype=torch.float32) for _ in "SsDd")
    return dq, dk, dv, dw, db, deta, dln_weight, dln_bias, *dstate
