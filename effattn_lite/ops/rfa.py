"""Random Feature Attention: softmax attention over directions, by random sines and cosines."""

import torch

from effattn_lite.ops.engines.feature_map import (
    attend,
    attend_step,
    check,
    check_omega,
    check_states,
    fourier,
)


def rfa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    omega: torch.Tensor,
    floor: float = 0.0,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    r"""Random feature attention: features whose products average to a Gaussian of the distance of directions.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}, \\
        \phi(x) = \tfrac{1}{\sqrt M} [\sin \omega_m \cdot \hat x,\, \cos \omega_m \cdot \hat x],
        \quad \hat x = x / \sqrt{\lVert x \rVert^2 + 10^{-6}}

    With a floor, the denominator is max(z . phi(q), floor). Without, weights always add up to 1, but they are
    large where the denominator is near 0, as products of few features are; where it vanishes (at most 1e-30
    in size), o is 0, and so is its gradient.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        omega: frequencies, [M, K] or, different in every head, [H, M, K], any dtype; Gaussian of spread
            sigma, they stand for softmax attention with scores sigma^2 q . k; differentiable.
        floor: smallest denominator; 0: none.
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
    state, whatever T. Kernels run in float32 whatever the dtype, since denominators cancel.
    Source: Peng et al. 2021, arXiv:2103.02143. Differs: the released code divides by the length + 1e-3, and
    has a floor of 1 with 0.64 for the product of equal features, which is 1 here.
    """
    sizes = check(q, k, v, cu_seqlens)
    omega = check_omega(omega, q, sizes)
    check_states(q, sizes, 2 * omega.shape[-2], initial_state=initial_state)
    return attend(
        fourier(q, omega), fourier(k, omega), v, signed=True, floor=floor,
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
    floor: float = 0.0,
    scale: float | None = None,
    out_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""One token of random feature attention, for decoding.

    .. math:: S_t = S_{t-1} + \phi(k_t) v_t^\top, \quad z_t = z_{t-1} + \phi(k_t), \quad
        o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t)}

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        omega: frequencies, [M, K] or [H, M, K].
        state: S_{t-1}, [N, H, 2 M, V], and z_{t-1}, [N, H, 2 M], float32.
        floor: as `rfa`.
        scale: as `rfa`.
        out_state: tuple that receives S_t and z_t; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (one launch for S, no gradient).

    Returns:
        o, [N, H, V], and the tuple S_t, z_t.

    Cost: N H (8 M V + 4 M K) FLOPs; reads and writes 8 N H M V bytes of state, which is all that counts.
    Source: Peng et al. 2021, arXiv:2103.02143.
    """
    sizes = check(q, k, v, axes="N")
    omega = check_omega(omega, q, sizes)
    check_states(q, sizes, 2 * omega.shape[-2], state=state, out_state=out_state)
    return attend_step(
        fourier(q, omega), fourier(k, omega), v, state=state, floor=floor, out_state=out_state, impl=impl
    )
