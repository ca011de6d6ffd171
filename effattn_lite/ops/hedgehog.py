"""Hedgehog: linear attention over learned features that are a softmax themselves."""

import torch

from effattn_lite.ops.common import check_alike, check_shape
from effattn_lite.ops.engines.feature_map import attend, attend_step, check, check_states


def hedgehog(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    wq: torch.Tensor,
    wk: torch.Tensor,
    bq: torch.Tensor | None = None,
    bk: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""Hedgehog: linear attention whose features are learned to mimic the spiky weights of a softmax.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}, \\
        \phi(x) = \operatorname{softmax}\bigl([u;\, -u]\bigr), \quad u = W x + b

    Queries and keys have maps of their own. Where the denominator vanishes (at most 1e-30), nothing seen
    answers the query: o is 0 there, and so is its gradient.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        wq: map of the queries, [H, M, K], any dtype; differentiable, as are the other three.
        wk: map of the keys, [H, M, K].
        bq: its bias, [H, M]; None: none.
        bk: its bias, [H, M]; None: none.
        scale: accepted as by every op; it would multiply numerator and denominator alike.
        initial_state: S_0, [N, H, 2 M, V], and z_0, [N, H, 2 M], float32; default zeros; differentiable.
        output_final_state: return S_T, z_T as well; they carry a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and the tuple S_T, z_T, float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with 2 M or V above 256.

    Cost: B H T (2 C (2 M + V + 1) + 8 M (V + 1) + 4 M K) FLOPs in chunks of C; 8 B H M (V + 1) bytes of
    state, whatever T. float16 runs in float32, since a sum of weights may pass 65504.
    Source: Zhang et al. 2024, arXiv:2402.04347. Differs: one softmax over both halves; LoLCATs takes one over
    each, fla one over both of 2 u.
    """
    sizes = check(q, k, v, cu_seqlens)
    maps = _check_maps(q, sizes, wq=wq, bq=bq), _check_maps(q, sizes, wk=wk, bk=bk)
    check_states(q, sizes, 2 * sizes["M"], initial_state=initial_state)
    return attend(
        features(q, *maps[0]), features(k, *maps[1]), v,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    wq: torch.Tensor,
    wk: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    bq: torch.Tensor | None = None,
    bk: torch.Tensor | None = None,
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of Hedgehog, for decoding.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        wq, wk, bq, bk: as `hedgehog`.
        state: S_{t-1}, [N, H, 2 M, V], and z_{t-1}, [N, H, 2 M], float32.
        scale: as `hedgehog`.
        out_state: tuple that receives S_t and z_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch for S, no gradient).

    Returns:
        o, [N, H, V], and the tuple S_t, z_t.

    Cost: N H (8 M V + 4 M K) FLOPs; reads and writes 8 N H M V bytes of state, which is all that counts.
    Source: Zhang et al. 2024, arXiv:2402.04347.
    """
    sizes = check(q, k, v, axes="N")
    maps = _check_maps(q, sizes, wq=wq, bq=bq), _check_maps(q, sizes, wk=wk, bk=bk)
    check_states(q, sizes, 2 * sizes["M"], state=state, out_state=out_state)
    phi_q, phi_k = features(q, *maps[0]), features(k, *maps[1])
    return attend_step(phi_q, phi_k, v, state=state, out_state=out_state, impl=impl)


def features(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    r"""Positive features that add up to 1: a softmax over a linear map of x and its negative.

    .. math:: \phi(x) = \operatorname{softmax}\bigl([u;\, -u]\bigr), \quad u = W x + b

    Args:
        x: queries or keys, [..., H, K].
        w: W of every head, [H, M, K].
        b: b of every head, [H, M]; None: none.

    Returns:
        [..., H, 2 M], float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # autocast would turn the float32 product into bfloat16
    with torch.autocast(x.device.type, enabled=False):
        u = torch.einsum("...hk,hmk->...hm", x.to(wide).contiguous(), w.to(wide).contiguous())
        u = u if b is None else u + b.to(wide)
        return torch.cat((u, -u), dim=-1).softmax(-1)


def _check_maps(q, sizes, **maps):
    # M is the same for queries and keys, since their features meet
    for (name, x), axes in zip(maps.items(), ("H M K", "H M"), strict=True):
        if x is not None:
            check_shape(name, x, axes, sizes)
            check_alike(name, x, q, dtype=False)
    return maps.values()
