"""Performer (FAVOR+): softmax attention by random positive features."""

import torch

from effattn_lite.ops.engines.feature_map import attend, attend_step, check, check_omega, check_states

CAP = 60.0
"""Keys' features are cut at e^CAP: 2^30 of them still add up to a float32 number."""


def performer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    omega: torch.Tensor,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""FAVOR+: linear attention over features whose products average to the exponential of a score.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}, \\
        \phi(x)_m = \frac{1}{\sqrt M} \exp\Bigl(\omega_m \cdot \bar x - \tfrac12 \lVert \bar x \rVert^2\Bigr),
        \quad \bar x = x / K^{1/4}

    A query's largest exponent is subtracted from all of its own, which cancels in the quotient. Exponents of
    keys reach from far below 0 to half the square of a frequency, more than any constant could bring into
    float32's range; but the mean of their exponentials over omega is 1, so by Markov's inequality a chance of
    e^-60 is left to e^60. There, at keys that were made to fit a frequency, features are cut. Where the
    denominator vanishes (at most 1e-30), o is 0, and so is its gradient.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega: frequencies, [M, K] or, different in every head, [H, M, K], any dtype; `layers.performer` draws
            them orthogonal; differentiable.
        scale: accepted as by every op; it would multiply numerator and denominator alike.
        initial_state: S_0, [N, H, M, V], and z_0, [N, H, M], float32; default zeros; differentiable.
        output_final_state: return S_T, z_T as well; they carry a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 64 in torch; Triton takes at most what its table says.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and the tuple S_T, z_T, float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with M or V above 256.

    Cost: B H T (2 C (M + V + 1) + 4 M (V + 1) + 4 M K) FLOPs in chunks of C; 4 B H M (V + 1) bytes of state,
    whatever T. float16 runs in float32, since a sum of weights may pass 65504.
    Source: Choromanski et al. 2021, arXiv:2009.14794. Differs: the released code subtracts the largest
    exponent of all keys, the future's included, and adds a small number to every feature.
    """
    sizes = check(q, k, v, cu_seqlens)
    omega = check_omega(omega, q, sizes)
    check_states(q, sizes, omega.shape[-2], initial_state=initial_state)
    return attend(
        _features(q, omega, query=True), _features(k, omega, query=False), v,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    omega: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of FAVOR+, for decoding.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        omega: frequencies, [M, K] or [H, M, K].
        state: S_{t-1}, [N, H, M, V], and z_{t-1}, [N, H, M], float32.
        scale: as `performer`.
        out_state: tuple that receives S_t and z_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch for S, no gradient).

    Returns:
        o, [N, H, V], and the tuple S_t, z_t.

    Cost: N H (4 M V + 4 M K) FLOPs; reads and writes 4 N H M V bytes of state, which is all that counts.
    Source: Choromanski et al. 2021, arXiv:2009.14794.
    """
    sizes = check(q, k, v, axes="N")
    omega = check_omega(omega, q, sizes)
    check_states(q, sizes, omega.shape[-2], state=state, out_state=out_state)
    phi_q, phi_k = _features(q, omega, query=True), _features(k, omega, query=False)
    return attend_step(phi_q, phi_k, v, state=state, out_state=out_state, impl=impl)


def _features(x, omega, *, query):
    # autocast would turn the float32 product into bfloat16
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(omega.dtype).contiguous() / x.shape[-1] ** 0.25
        score = torch.einsum("...hk,hmk->...hm", x, omega) - x.square().sum(-1, keepdim=True) / 2
        # what is subtracted of all cancels, so no gradient needs to pass through it
        score = score - score.detach().amax(-1, keepdim=True) if query else score.clamp(max=CAP)
        return score.exp() / omega.shape[-2] ** 0.5
