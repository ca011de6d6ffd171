"""Launches of the slots engine: the gated-decay engine's launcher for all but the scores and the softmax."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2
from effattn_lite.kernels.gated_decay_launch import Launcher
from effattn_lite.kernels.slots import (
    ROWS,
    SHARES,
    score_tiles,
    slots_score_kernel,
    slots_softmax_gradient_kernel,
    slots_softmax_kernel,
)
from effattn_lite.kernels.slots_shares import slots_shares_gradient_kernel, slots_shares_kernel
from effattn_lite.kernels.slots_step import slots_step_kernel


def forward(q, k, v, s, g, Sk, Sv, cu_seqlens, scale, output_final_state, chunk_size):
    """o, the final states (empty unless asked for), and p, which the gradient needs."""
    with on_device(q):
        Sk = Sk.mT.contiguous() if Sk is not None else None
        run = Launcher(s, s, k, g, None, Sk, cu_seqlens, chunk_size)
        p, last_Sk = _scores(run, q, scale, output_final_state, chunk_size)
        run = Launcher(p, s, v, run.g, None, Sv, cu_seqlens, chunk_size)
        last_Sv = run.wide(run.N, run.H, run.K, run.V) if output_final_state else None
        left = run.write(run.k, run.v, scale=1.0, reverse=False)
        o, _ = run.read(p, run.k, run.v, h0=run.h0, left=left, ht=last_Sv)
    none = (q.new_empty(0, dtype=torch.float32) for _ in "12")
    return o, *((last_Sk, last_Sv) if output_final_state else none), p


def backward(do, dSk, dSv, p, q, k, v, s, g, Sk, Sv, cu_seqlens, scale, chunk_size):
    """Gradients of q, k, v, s, g and the initial states: of both passes, last first."""
    with on_device(q):
        g, s = g.float().contiguous(), s.contiguous()
        run = Launcher(p, s, v, g, None, Sv, cu_seqlens, chunk_size)
        dp, ds, dv, dg, dSv = _gradients(run, do.contiguous(), dSv, scale=1.0)
        dx = torch.empty_like(p)
        R, M = p.numel() // p.shape[-1], p.shape[-1]
        slots_softmax_gradient_kernel[(cdiv(R, ROWS),)](p, dp, dx, R, M=M, BM=padded(M), ROWS=ROWS)
        Sk, dSk = (x.mT.contiguous() if x is not None else None for x in (Sk, dSk))
        run = Launcher(dx, s, k, g, None, Sk, cu_seqlens, chunk_size)
        left = run.write(run.k, run.v, scale=1.0, reverse=False)
        dq, _ = run.read(run.q, run.k, run.v, h0=run.h0, left=left, read_scale=scale)
        _, more, dk, again, dSk = _gradients(run, q.contiguous(), dSk, scale=scale, left=left)
    none = q.new_empty(0, dtype=torch.float32)
    dSk = none if dSk is None else dSk.mT.contiguous()
    return dq, dk, dv, ds + more, dg + again, dSk, (none if dSv is None else dSv)


def _scores(run, q, scale, output_final_state, chunk_size):
    # p, and K~ after the text; the launcher's K is M, its V is K
    q, K, M = q.contiguous(), run.V, run.K
    C, BM, options = score_tiles(K, M, run.dtype, capability=capability(q) or 80, chunk_size=chunk_size)
    whole = BM >= M
    p = torch.empty_like(run.k)
    x = p if whole else run.wide(*p.shape)
    ht = run.wide(run.N, run.H, K, M) if output_final_state else None
    left = run.write(run.k, run.v, scale=1.0, reverse=False)
    sizes = {name: n for name, n in run.sizes().items() if name in ("T", "L", "N", "H", "BS", "PACKED")}
    slots_score_kernel[(run.segments * run.H * cdiv(M, BM),)](
        q, run.v, run.k, run.g, run.h0, *left, x, ht, run.cu_seqlens, scale, K=K, M=M, C=C, BK=padded(K),
        BM=BM, HAS_H0=run.h0 is not None, SEGMENTS=left[0] is not None, STORE_HT=ht is not None, WHOLE=whole,
        **sizes, **options,
    )  # fmt: skip
    if not whole:
        R = x.numel() // M
        slots_softmax_kernel[(cdiv(R, ROWS),)](x, p, R, M=M, BM=padded(M), ROWS=ROWS)
    return p, ht


def _gradients(run, do, dht, *, scale, left=None):
    # dq, dk, dv, dg, dh0 of the gated-decay engine
    dht = dht.contiguous() if dht is not None else None
    dh0 = run.wide(run.N, run.H, run.K, run.V) if run.h0 is not None else None
    left = left or run.write(run.k, run.v, scale=1.0, reverse=False)
    right = run.write(run.q, do, scale=scale, reverse=True)
    dv, states = run.read(run.k, run.q, do, h0=dht, left=right, write_scale=scale, reverse=True, ht=dh0)
    dq, dk, dg, _ = run.gradient(do, states, left=left, scale=scale)
    return dq, dk, dv, dg, dh0


def shares(s, z, c, cu_seqlens):
    """w in the dtype of s, g and the log of the sum after the text."""
    with on_device(s):
        s, z, c = s.contiguous(), z.contiguous(), c.contiguous()
        w, g, out_z = torch.empty_like(s), torch.empty_like(s, dtype=torch.float32), torch.empty_like(z)
        grid, sizes = _columns(s, z, cu_seqlens)
        slots_shares_kernel[grid](s, z, c, w, g, out_z, **sizes)
    return w, g, out_z


def shares_backward(dw, dg, dz, g, c, cu_seqlens):
    """ds in the dtype of dw, and the gradient of z."""
    with on_device(g):
        dw, dg, dz, g, c = (x.contiguous() for x in (dw, dg, dz, g, c))
        ds, out_dz = torch.empty_like(dw), torch.empty_like(dz)
        grid, sizes = _columns(g, dz, cu_seqlens)
        slots_shares_gradient_kernel[grid](dw, dg, dz, g, c, ds, out_dz, **sizes)
    return ds, out_dz


def _columns(s, z, cu_seqlens):
    N, H, M = z.shape
    packed = cu_seqlens is not None
    sizes = dict(
        cu_seqlens=cu_seqlens.contiguous() if packed else None, T=s.shape[1], N=N, D=H * M, M=M,
        BS=power_of_2(N) if packed else 1, PACKED=packed, **SHARES,
    )  # fmt: skip
    return (N * cdiv(H * M, SHARES["BD"]),), sizes


def step(q, k, v, s, g, Sk, Sv, z, c, out_Sk, out_Sv, out_z, out_c, scale):
    """o of one token; the next state is written to the `out` tensors."""
    with on_device(q):
        K, (N, H, V), M = q.shape[-1], v.shape, s.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        g = g.float().contiguous() if g is not None else None
        slots_step_kernel[(N * H,)](
            *(x.contiguous() for x in (q, k, v, s)), g, Sk, Sv, z, c, o, out_Sk, out_Sv, out_z, out_c, scale,
            H=H, K=K, V=V, M=M, BK=16, BV=16, BM=padded(M), AVERAGE=g is None, num_warps=4,
        )  # fmt: skip
    return o
