"""Launches of the mLSTM engine: segments from the size of the chip, roles of the backward."""

import torch

from effattn_lite.kernels.common.launch import capability, cdiv, on_device, padded, power_of_2, processors
from effattn_lite.kernels.mlstm import mlstm_forward_kernel, mlstm_write_kernel, square, tiles
from effattn_lite.kernels.mlstm_backward import mlstm_gates_kernel, mlstm_gradient_kernel, mlstm_rows_kernel
from effattn_lite.kernels.mlstm_step import mlstm_step_kernel

ROUND = 64
"""A segment is a multiple of this many tokens."""


class Launcher:
    """One call's sizes and flags, and its kernels."""

    def __init__(self, q, k, v, i, f, state, cu_seqlens, scale, chunk_size):
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.dtype, self.device, self.scale, self.chunk_size = q.dtype, q.device, scale, chunk_size
        self.q, self.k, self.v, self.i, self.f = (x.contiguous() for x in (q, k, v, i, f))
        self.has_h0 = state[0] is not None
        self.h0 = [x.contiguous() if self.has_h0 else None for x in state]
        self.cu_seqlens = cu_seqlens.contiguous() if cu_seqlens is not None else None
        self.packed = cu_seqlens is not None
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

    def empty(self, *shape):
        """A float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def sizes(self):
        """Arguments that kernels which know segments share."""
        BS = power_of_2(self.N) if self.packed else 1
        return dict(T=self.T, L=self.L, N=self.N, H=self.H, BS=BS, PACKED=self.packed)

    def state(self):
        """An empty state (C, n, m) of every sequence."""
        return (
            self.empty(self.N, self.H, self.K, self.V),
            self.empty(self.N, self.H, self.K),
            self.empty(self.N, self.H),
        )

    def write(self, k, v, *, rows=(None,) * 3, reverse=False):
        """What every segment writes: states, normalisers and marks, or Nones where one segment is all.

        rows: mt, r and d, for the reverse.
        """
        if not self.segmented:
            return None, None, None
        S, n = self.empty(self.segments, self.H, self.K, self.V), self.empty(self.segments, self.H, self.K)
        marks = self.empty(self.segments, self.H, 1 if reverse else 2)
        C, BK, BV, options = square(self.K, self.V, self.dtype, capability=self.capability)
        grid = self.segments * self.H * cdiv(self.K, BK) * cdiv(self.V, BV)
        mlstm_write_kernel[(grid,)](
            k, v, self.i, self.f, *rows, S, n, marks, self.cu_seqlens, self.scale, K=self.K, V=self.V,
            C=C, BK=BK, BV=BV, **self.sizes(), REVERSE=reverse, **options,
        )  # fmt: skip
        return S, n, marks

    def tiled(self, axis, columns):
        """C, the two tile widths and the options of a read that sums over `axis`."""
        C, BA, BX, options = tiles(axis, self.dtype, capability=self.capability, chunk_size=self.chunk_size)
        return C, BA, min(BX, padded(columns)), options

    def forward(self, segments, final):
        """o, and every token's stabiliser and denominator; `final` (C, n, m) or None is filled."""
        o = torch.empty_like(self.v)
        mt, den = (self.empty(self.B, self.T, self.H) for _ in "md")
        C, BK, BV, options = self.tiled(self.K, self.V)
        mlstm_forward_kernel[(self.segments * self.H * cdiv(self.V, BV),)](
            self.q, self.k, self.v, self.i, self.f, *self.h0, *segments, o, *(final or (None,) * 3), mt, den,
            self.cu_seqlens, self.scale, K=self.K, V=self.V, C=C, BK=BK, BV=BV, **self.sizes(),
            HAS_H0=self.has_h0, SEGMENTS=self.segmented, STORE_HT=final is not None, **options,
        )  # fmt: skip
        return o, mt, den

    def gradient(self, a, b, c, *, rows, dht, segments, dsegments, reverse, norm, parts, dh0):
        """One of dq, dk, dv; see `mlstm_gradient_kernel`. parts: di and P of dk; dh0: dC_0 and dn_0."""
        A, X = a.shape[-1], c.shape[-1]
        out = torch.empty_like(c)
        C, BA, BX, options = self.tiled(A, X)
        mlstm_gradient_kernel[(self.segments * self.H * cdiv(X, BX),)](
            a, b, c, self.k, self.i, self.f, *rows, *self.h0, *dht, *segments, *dsegments, out, *parts, *dh0,
            self.cu_seqlens, 1.0 if reverse else self.scale, self.scale if reverse else 1.0,
            self.B * self.T * self.H, K=self.K, V=self.V, A=A, X=X, C=C, BA=BA, BX=BX, **self.sizes(),
            REVERSE=reverse, NORM=norm, HAS_H0=self.has_h0, HAS_DHT=dht[0] is not None,
            SEGMENTS=self.segmented, **options,
        )  # fmt: skip
        return out

    def rows(self, o, do, mt, den):
        """r, d and u of `mlstm_rows_kernel`, [B, T, H] each."""
        r, d, u = self.empty(3, *mt.shape)
        BV, ROWS = padded(self.V), mt.numel()
        mlstm_rows_kernel[(cdiv(ROWS, 32),)](
            o, do, mt, den, r, d, u, ROWS, V=self.V, BR=32, BV=BV, num_warps=4
        )
        return r, d, u

    def gates(self, u, parts, P, held):
        """di and df, float32."""
        di, df = self.empty(*u.shape), self.empty(*u.shape)
        mlstm_gates_kernel[(self.segments * self.H,)](
            self.f, u, parts, P, held, di, df, self.cu_seqlens, u.numel(), NX=parts.shape[0], BT=128,
            **self.sizes(), HELD=held is not None, num_warps=4,
        )  # fmt: skip
        return di, df


def forward(q, k, v, i, f, state, cu_seqlens, scale, output_final_state, chunk_size):
    """o, the final state (empty unless asked for), every token's stabiliser and denominator."""
    with on_device(q):
        run = Launcher(q, k, v, i, f, state, cu_seqlens, scale, chunk_size)
        final = run.state() if output_final_state else None
        o, mt, den = run.forward(run.write(run.k, run.v), final)
    return o, *(final or (q.new_empty(0, dtype=torch.float32) for _ in "Cnm")), mt, den


def backward(do, final, o, mt, den, q, k, v, i, f, state, cu_seqlens, scale, chunk_size):
    """Gradients of q, k, v, i, f and the initial state; final: ((dC, dn, dm), (C_T, n_T)) or None."""
    with on_device(q):
        run = Launcher(q, k, v, i, f, state, cu_seqlens, scale, chunk_size)
        do, dht, held = do.contiguous(), (None, None), None
        if final is not None:
            dht = tuple(x.contiguous() for x in final[0][:2])
            held = inner(dht, final[1])
        r, d, u = run.rows(o, do, mt, den)
        rows = mt, r, d
        segments = run.write(run.k, run.v)
        dsegments = run.write(run.q, do, rows=rows, reverse=True)
        NX = cdiv(run.K, run.tiled(run.V, run.K)[2])
        parts, P = run.empty(NX, *mt.shape), run.empty(NX, run.segments, run.H)
        dh0 = run.state()[:2] if run.has_h0 else (None, None)
        common = dict(rows=rows, dht=dht, segments=segments, dsegments=dsegments, parts=(parts, P), dh0=dh0)
        dv = run.gradient(run.k, run.q, do, **common, reverse=True, norm=False)
        dk = run.gradient(run.v, do, run.q, **common, reverse=True, norm=True)
        dq = run.gradient(do, run.v, run.k, **common, reverse=False, norm=True)
        di, df = run.gates(u, parts, P, held)
        dm0 = inner(dh0, run.h0) if run.has_h0 else None
        if final is not None:
            di, df, dm0 = through_stabiliser(run, final[0][2] - held, mt, di, df, dm0)
    none = q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, di, df, *((*dh0, dm0) if run.has_h0 else (none,) * 3)


def inner(a, b):
    """Inner product of two states (C, n), [N, H]."""
    return (a[0] * b[0]).sum((-2, -1)) + (a[1] * b[1]).sum(-1)


def through_stabiliser(run, dm, mt, di, df, dm0):
    """Add what reaches the gates through the final stabiliser.

    m_T is the gate of one token, faded since, or the initial m faded all the way: the last token with
    m_t = i_t is the one. dm [N, H] is the gradient of m_T where e^m C and e^m n stay as they are.
    """
    t = torch.arange(run.T, device=run.device)
    if run.packed:
        owner = torch.searchsorted(run.cu_seqlens, t.to(run.cu_seqlens.dtype), right=True) - 1
    own = (lambda x: x[owner][None]) if run.packed else (lambda x: x[:, None])
    wrote = torch.where(mt <= run.i.float(), t[:, None], -1)  # [B, T, H]
    if run.packed:
        last = torch.full_like(dm, -1, dtype=torch.int64)
        last = last.scatter_reduce(0, owner[:, None].expand(-1, run.H), wrote[0], "amax")
    else:
        last = wrote.amax(1)
    di = di + torch.where(t[:, None] == own(last), own(dm), 0)
    df = df + torch.where(t[:, None] > own(last), own(dm), 0) * torch.sigmoid(-run.f.float())
    return di, df, None if dm0 is None else dm0 + torch.where(last < 0, dm, 0)


def step(q, k, v, i, f, state, out_state, scale):
    """o of one token; the next state is written to `out_state`."""
    with on_device(q):
        N, H, K = q.shape
        V = v.shape[-1]
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        q, k, v, i, f = (x.contiguous() for x in (q, k, v, i, f))
        mlstm_step_kernel[(N * H,)](
            q, k, v, i, f, *state, o, *out_state, scale, K=K, V=V, BK=padded(K), BV=16, num_warps=4
        )
    return o
