"""cosFormer: nonnegative scores, reweighted by the cosine of a distance."""

import math

import torch

from effattn_lite.ops.engines.feature_map import attend, attend_step, check, check_states


def cosformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    max_length: int,
    offset: int = 0,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""cosFormer: an average whose weights are nonnegative scores times the cosine of a distance.

    .. math:: o_t = \frac{\sum_{j \le t} w_{tj} v_j}{\sum_{j \le t} w_{tj}}, \qquad
        w_{tj} = \max(q_t, 0) \cdot \max(k_j, 0)\, \cos \theta(t - j), \qquad \theta = \frac{\pi}{2 M}

    The cosine of a difference is a sum of two products: features are [x' cos a; x' sin a], a = theta times
    the position, x' = max(x, 0). S and z hold positions as seen from their last token, so that a text may go
    on at any token without a count of those before; only a final state is turned for it. Where the
    denominator vanishes (at most 1e-30 in size), nothing seen answers the query: o is 0 there, and so is its
    gradient.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        max_length: the paper's M, tokens that a text may have; so far away a weight is 0, beyond it negative.
        offset: tokens before initial_state; they count against max_length alone.
        scale: accepted as by every op; it would multiply numerator and denominator alike.
        initial_state: S_0, [N, H, 2 K, V], and z_0, [N, H, 2 K], float32; default zeros; differentiable.
        output_final_state: return S_T, z_T as well; they carry a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and the tuple S_T, z_T, float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit, or a text is longer than max_length
            (packed on a GPU none is looked at, since reading the edges would wait).
        NotImplementedError: impl="triton" with 2 K or V above 256.

    Cost: B H T (2 C (2 K + V + 1) + 8 K (V + 1)) FLOPs in chunks of C; 8 B H K (V + 1) bytes of state,
    whatever T. float16 runs in float32, since a sum of weights may pass 65504.
    Source: Qin et al. 2022, arXiv:2202.08791. Differs: positions count from the last token, not from the
    first; the released code bounds the denominator by 1e-6 from below.
    """
    sizes = check(q, k, v, cu_seqlens)
    check_states(q, sizes, 2 * sizes["K"], initial_state=initial_state)
    _check_length(sizes["T"], max_length, offset, cu_seqlens)
    position = torch.arange(1, sizes["T"] + 1, device=q.device)
    length = torch.full((sizes["N"],), sizes["T"], device=q.device)
    if cu_seqlens is not None:
        owner = torch.searchsorted(cu_seqlens, position.to(cu_seqlens.dtype), right=False) - 1
        position, length = position - cu_seqlens[owner], cu_seqlens.diff()
    angle, turn = _angle(position, max_length, q), _angle(length, max_length, q)
    o, state = attend(
        _features(q, angle), _features(k, angle), v,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip
    return o, tuple(_turn(x, turn) for x in state) if output_final_state else None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    max_length: int,
    state: tuple[torch.Tensor, torch.Tensor],
    offset: int = 0,
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of cosFormer, for decoding.

    .. math:: o_t = \frac{\sum_{j \le t} w_{tj} v_j}{\sum_{j \le t} w_{tj}}, \qquad
        w_{tj} = \max(q_t, 0) \cdot \max(k_j, 0)\, \cos \theta(t - j), \qquad \theta = \frac{\pi}{2 M}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        max_length: as `cosformer`.
        state: S_{t-1}, [N, H, 2 K, V], and z_{t-1}, [N, H, 2 K], float32, as seen from their last token.
        offset: tokens before this one; they count against max_length alone.
        scale: as `cosformer`.
        out_state: tuple that receives S_t and z_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch for S, no gradient).

    Returns:
        o, [N, H, V], and the tuple S_t, z_t.

    Raises:
        ValueError: shapes do not fit, or the text is longer than max_length.

    Cost: 14 N H K V FLOPs; reads and writes 8 N H K V bytes of state, and once more to turn it.
    Source: Qin et al. 2022, arXiv:2202.08791.
    """
    sizes = check(q, k, v, axes="N")
    check_states(q, sizes, 2 * sizes["K"], state=state, out_state=out_state)
    _check_length(1, max_length, offset, None)
    theta = _angle(torch.ones((), device=q.device), max_length, q)
    o, state = attend_step(
        _features(q, theta), _features(k, theta), v, state=state, out_state=out_state, impl=impl
    )
    turned = tuple(_turn(x, theta) for x in state)
    if out_state is not None:
        turned = tuple(kept.copy_(x) for kept, x in zip(out_state, turned, strict=True))
    return o, turned


def _check_length(T, max_length, offset, cu_seqlens):
    # reading the edges would wait for the device
    if cu_seqlens is not None:
        known = not (torch.compiler.is_compiling() or cu_seqlens.is_cuda)
        T = int(cu_seqlens.diff().max()) if known else 0
    if offset + T > max_length:
        raise ValueError(f"the text has {offset + T} tokens, expected at most max_length = {max_length}")


def _angle(position, max_length, q):
    return position.to(torch.promote_types(q.dtype, torch.float32)) * (math.pi / (2 * max_length))


def _features(x, angle):
    x, angle = x.to(angle.dtype).relu(), angle[..., None, None]  # [T, 1, 1], or [1, 1] for a step
    return torch.cat((x * angle.cos(), x * angle.sin()), dim=-1)


def _turn(x, angle):
    # seen from a later token, every position in a state falls by the same angle
    C, D = x.chunk(2, dim=2)
    angle = angle[(...,) + (None,) * (x.ndim - angle.ndim)]  # [N, 1, 1, 1] or all ones
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((C * cos + D * sin, D * cos - C * sin), dim=2)
