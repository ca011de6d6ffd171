"""Linear Transformer: attention whose weights are products of features, so that the past is a sum."""

from collections.abc import Callable

import torch

from effattn_lite.ops.engines.feature_map import attend, attend_step, check, check_states

FeatureMap = str | Callable[[torch.Tensor], torch.Tensor] | None


def linear_transformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""Linear attention: an average of the past whose weights are products of features.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Where the denominator vanishes (at most 1e-30 in size), as it may with "relu", nothing seen answers the
    query: o is 0 there, and so is its gradient.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        feature_map: "elu1", elu(x) + 1; "relu"; "softmax", over K; None, x itself; or a function
            [B, T, H, K] -> [B, T, H, M], which gets float32 (float64 for float64); a step's has no T.
            Features should not be negative, or the denominator may cross 0.
        normalize: divide; without, o is s S^T phi(q), and z is carried all the same.
        scale: s; default K ** -0.5; cancels in the quotient.
        initial_state: S_0, [N, H, M, V], and z_0, [N, H, M], float32; default zeros; differentiable.
        output_final_state: return S_T, z_T as well; they carry a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and the tuple S_T, z_T, float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit, or no map has that name.
        NotImplementedError: impl="triton" with M or V above 256.

    Cost: B H T (2 C (M + V + 1) + 4 M (V + 1)) FLOPs in chunks of C and those of the features; state
    4 B H M (V + 1) bytes, whatever T. float16 runs in float32, since a sum of weights may pass 65504.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236. Differs: the authors' code adds 1e-6 to the
    denominator.
    """
    sizes = check(q, k, v, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    phi_q, phi_k = _features("q", q, feature_map), _features("k", k, feature_map)
    check_states(q, sizes, phi_k.shape[-1], initial_state=initial_state)
    return attend(
        phi_q, phi_k, v, normalize=normalize, scale=1.0 if normalize else scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    state: tuple[torch.Tensor, torch.Tensor],
    feature_map: FeatureMap = "elu1",
    normalize: bool = True,
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of linear attention, for decoding.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        state: S_{t-1}, [N, H, M, V], and z_{t-1}, [N, H, M], float32.
        feature_map, normalize, scale: as `linear_transformer`.
        out_state: tuple that receives S_t and z_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch for S, no gradient).

    Returns:
        o, [N, H, V], and the tuple S_t, z_t.

    Cost: 4 N H M V FLOPs; reads and writes 4 N H M V bytes of state, which is all that counts.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    sizes = check(q, k, v, axes="N")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    phi_q, phi_k = _features("q", q, feature_map), _features("k", k, feature_map)
    check_states(q, sizes, phi_k.shape[-1], state=state, out_state=out_state)
    return attend_step(
        phi_q, phi_k, v, state=state, normalize=normalize, scale=1.0 if normalize else scale,
        out_state=out_state, impl=impl,
    )  # fmt: skip


def _elu1(x):
    # elu(x) + 1 as torch adds it rounds e^x away where x is far below 0
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


MAPS = {"elu1": _elu1, "relu": torch.relu, "softmax": lambda x: x.softmax(-1), None: lambda x: x}


def _features(name, x, feature_map):
    if not callable(feature_map) and feature_map not in MAPS:
        raise ValueError(f"feature_map is {feature_map!r}, expected one of {tuple(MAPS)} or a function")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        phi = (feature_map if callable(feature_map) else MAPS[feature_map])(wide)
    if phi.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"feature_map makes {tuple(phi.shape)} of {name}, expected {tuple(x.shape[:-1])} + (M,)"
        )
    return phi
