"""H3: a shift register for keys, a sum of exponential decays for their products with values."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl

CHUNK = 64
"""Default chunk: scores inside it, M matrices a head from chunk to chunk."""


def h3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    shift: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""Hungry Hungry Hippos: linear attention on weighted recent keys, times a learned function of the lag.

    .. math:: \bar k_t = \sum_{i < M} w_i \odot k_{t-i}, \qquad
        S_t^{(m)} = \bar A_m S_{t-1}^{(m)} + \bar B_m \bar k_t v_t^\top, \qquad
        o_t = s \Bigl(\operatorname{Re} \sum_m C_m S_t^{(m)} + D\, \bar k_t v_t^\top\Bigr)^\top q_t

    with :math:`\bar A = (1 + \tfrac\Delta2 A) / (1 - \tfrac\Delta2 A)` and
    :math:`\bar B = \Delta / (1 - \tfrac\Delta2 A)`.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 too).
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        shift: weights w of the last M keys, the token's own first, [H, K, M].
        dt: step size of a head, [H], > 0.
        A: rates of its M modes, [H, M], real part < 0, real or complex.
        C: weights of the modes, [H, M], real or complex.
        D: weight of the token's own product, [H]; default none.
        scale: s; default 1.
        initial_state: the last M keys, the newest first, [N, H, K, M], float32, and the modes, [N, H, M, K,
            V], float32, or complex64 if A or C is complex; default zeros.
        output_final_state: return both after the last token as well.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64. It changes no result.
        impl: "auto" or "torch"; it has no kernel of its own.

    Returns:
        o, [B, T, H, V], dtype of q; and the state, as the initial one (wide for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton".

    Cost: B T H (2 C (K + V) + 5 M K V + 2 K M) FLOPs in chunks of C; 4 B H M (K + K V) bytes of state, nearly
    twice that if complex.
    Source: Fu et al. 2023, arXiv:2212.14052, and the released code. Differs: a chunk is attention with a
    mask, where the paper convolves by Fourier transform; the skip of the shift is in its first weight.
    """
    parameters = _check(q, k, v, shift, dt, A, C, D, "B T H")
    check_cu_seqlens(cu_seqlens, *q.shape[:2])
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    _refuse(impl, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        R, S = _state("initial_state", initial_state, N, q, v, A, C)
        decay, write, taps, C, D = _prepare(*parameters, wide)
        parts, edges = [x.to(wide) for x in (q, k, v)], _edges(q, cu_seqlens)
        outputs, registers, modes = [parts[2][:, :0]], [], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            r, s = (R, S) if cu_seqlens is None else (R[n : n + 1], S[n : n + 1])
            for start in range(first, last, chunk_size or CHUNK):
                chunk = (x[:, start : min(start + (chunk_size or CHUNK), last)] for x in parts)
                o, r, s = _chunk(*chunk, decay, write, taps, C, D, r, s)
                outputs.append(o)
            registers.append(r)
            modes.append(s)
        o = (1.0 if scale is None else scale) * torch.cat(outputs, dim=1)
    return o.to(q.dtype), (torch.cat(registers), torch.cat(modes)) if output_final_state else None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    shift: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    C: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    D: torch.Tensor | None = None,
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of H3, for decoding.

    .. math:: S_t^{(m)} = \bar A_m S_{t-1}^{(m)} + \bar B_m \bar k_t v_t^\top, \qquad
        o_t = s \Bigl(\operatorname{Re} \sum_m C_m S_t^{(m)} + D\, \bar k_t v_t^\top\Bigr)^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        shift, dt, A, C, D: as in `h3`.
        state: the last M keys, [N, H, K, M], and the modes, [N, H, M, K, V].
        scale: s; default 1.
        out_state: two tensors that receive the state; `state` itself updates in place; default new ones.
        impl: "auto" or "torch".

    Returns:
        o, [N, H, V], and the state after the token.

    Cost: 5 N H M K V FLOPs; reads and writes the state, which is all that counts.
    Source: Fu et al. 2023, arXiv:2212.14052, and the released code.
    """
    parameters = _check(q, k, v, shift, dt, A, C, D, "N H")
    _refuse(impl, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        R, S = _state("state", state, len(q), q, v, A, C)
        _state("out_state", out_state, len(q), q, v, A, C)
        o, *new = _chunk(*(x.to(wide)[:, None] for x in (q, k, v)), *_prepare(*parameters, wide), R, S)
        o = (1.0 if scale is None else scale) * o[:, 0]
    if out_state is None:
        return o.to(q.dtype), tuple(new)
    return o.to(q.dtype), tuple(old.copy_(x) for old, x in zip(out_state, new, strict=True))


def _chunk(q, k, v, decay, write, taps, C, D, R, S):
    M, n = R.shape[-1], q.shape[1]
    # all keys, the register's first: k_{t-i} is at M + t - i
    text = torch.cat((R.flip(-1).permute(0, 3, 1, 2), k), dim=1)  # [B, M + C, H, K]
    windows = text.unfold(1, M, 1)[:, 1:]  # [B, C, H, K, M], the oldest first
    key = torch.einsum("hkm,bihkm->bihk", taps.flip(-1), windows)
    # 1 local decay: no power is above 1
    i = torch.arange(n, device=q.device)
    powers = decay ** torch.arange(n + 1, device=q.device)[:, None, None]  # [C + 1, H, M]
    kappa = (powers[:n] * write * C).sum(-1).real + torch.where(i[:, None] == 0, D, 0)  # [C, H]
    lag = i[:, None] - i
    table = torch.where((lag >= 0)[..., None], kappa[lag.clamp(min=0)], 0)  # [C, C, H]
    # 2 intra-chunk
    scores = torch.einsum("bihk,bjhk->bhij", q, key) * table.permute(2, 0, 1)
    # 3 chunk state
    left = (powers[:n].flip(0) * write)[..., None] * key.unsqueeze(3)  # [B, C, H, M, K]
    U = torch.einsum("bihmk,bihv->bhmkv", left, v.to(left.dtype))
    # 4 inter-chunk: mode by mode, since each has decayed at its own rate
    modes = torch.einsum("bihk,bhmkv->bihmv", q.to(S.dtype), S)
    past = torch.einsum("ihm,bihmv->bihv", powers[1:] * C, modes.to(C.dtype)).real
    S = powers[n][..., None, None] * S + U
    # 5 output
    return torch.einsum("bhij,bjhv->bihv", scores, v) + past, text[:, n:].flip(1).permute(0, 2, 3, 1), S


def _prepare(shift, dt, A, C, D, wide):
    kind = wide.to_complex() if A.is_complex() or C.is_complex() else wide
    half = dt.to(wide)[:, None] / 2 * A.to(kind)
    D = torch.zeros_like(dt, dtype=wide) if D is None else D.to(wide)
    return (1 + half) / (1 - half), dt.to(wide)[:, None] / (1 - half), shift.to(wide), C.to(kind), D


def _edges(q, cu_seqlens):
    return [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()


def _check(q, k, v, shift, dt, A, C, D, rows):
    sizes = {}
    check_shape("q", q, f"{rows} K", sizes)
    for name, x, axes in (("k", k, f"{rows} K"), ("v", v, f"{rows} V")):
        check_shape(name, x, axes, sizes)
        check_alike(name, x, q)
    named = {"shift": (shift, "H K M"), "dt": (dt, "H"), "A": (A, "H M"), "C": (C, "H M"), "D": (D, "H")}
    for name, (parameter, axes) in named.items():
        if parameter is not None:
            check_shape(name, parameter, axes, sizes, "q and shift")
            check_alike(name, parameter, q, dtype=False)
    return shift, dt, A, C, D


def _refuse(impl, q):
    if impl == "triton":
        raise NotImplementedError("h3 has no kernel for impl='triton'; use impl='torch'")
    choose_impl(impl, q)


def _state(name, state, N, q, v, A, C):
    wide = torch.promote_types(q.dtype, torch.float32)
    (H, K), V, M = q.shape[-2:], v.shape[-1], A.shape[1]
    kind = wide.to_complex() if A.is_complex() or C.is_complex() else wide
    expected = ((N, H, K, M), wide), ((N, H, M, K, V), kind)
    if state is None:
        return tuple(q.new_zeros(shape, dtype=dtype) for shape, dtype in expected)
    for i, (x, (shape, dtype)) in enumerate(zip(state, expected, strict=True)):
        if x.shape != shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}, expected {shape}")
        check_alike(f"{name}[{i}]", x, q, dtype=False)
        if x.dtype != dtype:
            raise TypeError(f"{name}[{i}] is {x.dtype}, expected {dtype}, since states are kept wide")
    return state
