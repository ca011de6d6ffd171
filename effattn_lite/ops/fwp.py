"""Fast weight programmers: the delta rule on DPFP features, sparse products of a key with itself."""

import torch

from effattn_lite.ops.common import check_alike, check_shape
from effattn_lite.ops.engines.delta import delta, delta_step


def fwp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    nu: int = 3,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""The delta rule on features: a key reads what its features hold, and moves it towards the new value.

    .. math:: S_t = S_{t-1} + \beta_t\, \phi(k_t)\, \bigl(v_t - S_{t-1}^\top \phi(k_t)\bigr)^\top, \qquad
        o_t = s\, S_t^\top \phi(q_t), \qquad \phi = \text{DPFP-}\nu

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: write strength, [B, T, H], in [0, 1].
        nu: shifts of the feature map; the state has M = 2 K nu rows.
        scale: s; default K ** -0.5, of the K before the map.
        initial_state: S_0, [N, H, M, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; torch's default is 64; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton"; features are made by torch in all of them.

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, M, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit, or nu is not in 1..2 K - 1.
        NotImplementedError: impl="triton" with M or V above 256.

    Cost: B T H (6 C M + 4 C V + C^2 + 6 M V) FLOPs in chunks of C, 6 B T H M V recurrent; 4 B H M V bytes of
    state; features are held in memory, B T H M entries each.
    Source: Schlag et al. 2021, arXiv:2102.11174; chunks as Yang et al. 2024, arXiv:2406.06484. Differs: the
    paper's state is the transpose; s is the one of its released code.
    """
    _check(q, k, "B T H K")
    return delta(
        features(q, nu=nu), features(k, nu=nu), v, beta=beta,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    state: torch.Tensor,
    nu: int = 3,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of the delta rule on features, for decoding.

    .. math:: S_t = S_{t-1} + \beta_t\, \phi(k_t)\, \bigl(v_t - S_{t-1}^\top \phi(k_t)\bigr)^\top, \qquad
        o_t = s\, S_t^\top \phi(q_t), \qquad \phi = \text{DPFP-}\nu

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        beta: write strength, [N, H].
        state: S_{t-1}, [N, H, M, V] with M = 2 K nu, float32.
        nu: shifts of the feature map.
        scale: s; default K ** -0.5.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch after the features, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, M, V].

    Cost: 6 N H M V FLOPs; reads and writes 4 N H M V bytes of state, which is all that counts.
    Source: Schlag et al. 2021, arXiv:2102.11174.
    """
    _check(q, k, "N H K")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = features(q, nu=nu), features(k, nu=nu)
    return delta_step(q, k, v, beta=beta, state=state, scale=scale, out_state=out_state, impl=impl)


def features(x: torch.Tensor, *, nu: int = 3) -> torch.Tensor:
    r"""Deterministic parameter-free projection (DPFP-nu), divided by its sum.

    .. math:: r = [\mathrm{ReLU}(x);\, \mathrm{ReLU}(-x)], \qquad
        \phi(x)_{2K(j-1) + i} \propto r_i\, r_{(i+j) \bmod 2K}, \qquad j = 1 \ldots \nu

    Args:
        x: keys or queries, [..., K].
        nu: shifts, 1 to 2 K - 1.

    Returns:
        non-negative features of sum 1, or all 0 where no product is left, [..., 2 K nu], dtype of x.

    Raises:
        ValueError: nu is not in 1..2 K - 1.

    Cost: 3 K + 6 K nu FLOPs a vector.
    Source: Schlag et al. 2021, arXiv:2102.11174. Differs: where no product is left the paper divides 0 by 0.
    """
    if not 1 <= nu < 2 * x.shape[-1]:
        raise ValueError(f"nu is {nu}, expected 1 to 2 K - 1 = {2 * x.shape[-1] - 1}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.cat((wide.relu(), (-wide).relu()), dim=-1)  # [..., 2 K]
    phi = torch.cat([r * r.roll(-j, dims=-1) for j in range(1, nu + 1)], dim=-1)
    total = phi.sum(-1, keepdim=True)
    return (phi / torch.where(total > 0, total, 1)).to(x.dtype)


def _check(q, k, axes):
    # before the map, so that errors speak of K; the engine checks the rest
    sizes = {}
    check_shape("q", q, axes, sizes)
    check_shape("k", k, axes, sizes)
    check_alike("k", k, q)
