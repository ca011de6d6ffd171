r"""Linear attention over features: a sum of values and a sum of weights, both by the engine of decays.

.. math:: S_t = e^{g_t} S_{t-1} + \phi_t^k v_t^\top, \quad z_t = e^{g_t} z_{t-1} + \phi_t^k, \quad
    o_t = \frac{S_t^\top \phi_t^q}{z_t \cdot \phi_t^q}

The denominator is what a value that is always 1 would read: one more column of v and of the state. Where that
column would double the width of a padded tile it is read by a call of its own. Maps are plain torch; what
they compute stays float32, except that a bfloat16 text's nonnegative features enter kernels as bfloat16.
float16 has no room for a denominator: a sum of T weights passes its largest number, 65504.
"""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape
from effattn_lite.ops.engines.decay import decay, decay_step

NOTHING = 1e-30
"""A denominator of at most this size means that nothing seen answers the query; float32 holds its inverse."""


def attend(
    phi_q, phi_k, v, *, g=None, engine=decay, signed=False, normalize=True, floor=0.0, scale=1.0,
    initial_state, output_final_state, cu_seqlens, chunk_size, impl,
):  # fmt: skip
    """Outputs [B, T, H, V] in v's dtype, and the final state or None.

    Args:
        phi_q, phi_k: features, [B, T, H, M], float32, or float64 for float64.
        v: values, [B, T, H, V].
        g: log decay of the engine; None: nothing fades.
        engine: a function of ops/engines/ with the arguments of `decay`.
        signed: features may be negative, so that denominators cancel: nothing is rounded to bfloat16.
        normalize: divide by the denominator.
        floor: smallest denominator; 0: any, and o = 0 where it vanishes.
        scale: of an output that is not divided.
        initial_state: S_0, z_0, or None.
        output_final_state, cu_seqlens, chunk_size, impl: as in the ops.
    """
    fused = impl == "triton" or (impl == "auto" and v.is_cuda)
    narrow = fused and v.dtype == torch.bfloat16 and not signed
    q, k, values = (x.to(torch.bfloat16 if narrow else phi_q.dtype) for x in (phi_q, phi_k, v))
    g = phi_q.new_zeros(v.shape[2]) if g is None else g
    S, z = initial_state or (None, None)

    def read(columns, state):
        return engine(
            q, k, columns, g=g, scale=scale, initial_state=state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
        )  # fmt: skip

    ones = torch.ones_like(values[..., :1])
    column = z[..., None] if z is not None else None
    if _tile(v.shape[-1] + 1) == _tile(v.shape[-1]):
        both = torch.cat((S, column), dim=-1) if S is not None else None
        o, state = read(torch.cat((values, ones), dim=-1), both)
        num, den = o[..., :-1], o[..., -1:]
        if output_final_state:
            # copies: a step may write to them in place
            S, z = state[..., :-1].contiguous(), state[..., -1].contiguous()
    else:
        num, S = read(values, S)
        den, column = read(ones, column) if normalize or output_final_state else (None, None)
        z = column.squeeze(-1) if output_final_state else None
    o = divide(num, den, floor=floor, dtype=phi_q.dtype) if normalize else num
    return o.to(v.dtype), (S, z) if output_final_state else None


def attend_step(
    phi_q, phi_k, v, *, state, g=None, engine_step=decay_step, normalize=True, floor=0.0, scale=1.0,
    out_state, impl,
):  # fmt: skip
    """One token's output [N, H, V] and the state after it; the values' sum is one launch, in place if asked.

    Args:
        phi_q, phi_k: features, [N, H, M], float32, or float64 for float64.
        v: value, [N, H, V].
        state: S_{t-1}, z_{t-1}.
        g: log decay of the engine; None: nothing fades.
        engine_step: a function of ops/engines/ with the arguments of `decay_step`.
        normalize, floor, scale: as `attend`.
        out_state: tuple that receives S_t and z_t, or None.
        impl: as in the ops.
    """
    S, z = state
    wide = phi_q.dtype
    kept = z if g is None else z * g.to(wide).exp()[..., None]
    o, S = engine_step(
        phi_q, phi_k, v.to(wide), g=phi_q.new_zeros(v.shape[1]) if g is None else g, state=S, scale=scale,
        out_state=None if out_state is None else out_state[0], impl=impl,
    )  # fmt: skip
    z = kept + phi_k
    if normalize:
        o = divide(o, (phi_q * z).sum(-1, keepdim=True), floor=floor, dtype=wide)
    return o.to(v.dtype), (S, z if out_state is None else out_state[1].copy_(z))


def divide(num, den, *, floor=0.0, dtype):
    """num / den, den at least `floor`; without a floor 0, gradient included, where den vanishes."""
    num, den = num.to(dtype), den.to(dtype)
    return num / (den.clamp(min=floor) if floor else den.masked_fill(den.abs() <= NOTHING, float("inf")))


def fourier(x, omega):
    r"""Random Fourier features of directions, [..., H, 2 M], of x [..., H, K] and omega [H, M, K], M of each.

    .. math:: \phi(x) = \tfrac{1}{\sqrt M} [\sin \omega_m \cdot \hat x,\, \cos \omega_m \cdot \hat x],
        \quad \hat x = x / \sqrt{\lVert x \rVert^2 + 10^{-6}}
    """
    # autocast would turn the float32 product into bfloat16
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(omega.dtype).contiguous()
        x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        score = torch.einsum("...hk,hmk->...hm", x, omega)
        return torch.cat((score.sin(), score.cos()), dim=-1) / omega.shape[-2] ** 0.5


def check(q, k, v, cu_seqlens=None, *, axes="B T"):
    """Check what the ops over features share; `axes` is "N" for a step's tensors.

    Args:
        q, k, v: [B, T, H, K], [B, T, H, K], [B, T, H, V]; a step's have [N, ...].
        cu_seqlens: as in the ops.

    Returns:
        Sizes by letter; what else has them is checked against it.
    """
    sizes = {}
    for name, x, last in (("q", q, "K"), ("k", k, "K"), ("v", v, "V")):
        check_shape(name, x, f"{axes} H {last}", sizes)
        check_alike(name, x, q)
    if axes == "B T":
        check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
        sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    return sizes


def check_states(q, sizes, features, **states):
    """Check states by name, each a tuple of S, [N, H, M, V], and z, [N, H, M], or None; M is `features`."""
    sizes = sizes | {"M": features}
    wide = torch.promote_types(q.dtype, torch.float32)
    for name, state in states.items():
        if state is not None and (not isinstance(state, tuple) or len(state) != 2):
            raise ValueError(
                f"{name} is {type(state).__name__}, expected a tuple: S [N, H, M, V], z [N, H, M]"
            )
        for i, (x, axes) in enumerate(zip(state or (), ("N H M V", "N H M"), strict=False)):
            check_shape(f"{name}[{i}]", x, axes, sizes)
            check_alike(f"{name}[{i}]", x, q, dtype=False)
            if x.dtype != wide:
                raise TypeError(f"{name}[{i}] is {x.dtype}, expected {wide}, since states are kept wide")


def check_omega(omega, q, sizes):
    """Check frequencies, [M, K] or [H, M, K], and give them as [H, M, K], as wide as features are."""
    own = {"H": sizes["H"], "K": sizes["K"]}
    check_shape("omega", omega, "M K" if omega.ndim == 2 else "H M K", own)
    check_alike("omega", omega, q, dtype=False)
    wide = omega.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    return wide.expand(own["H"], -1, -1)


def _tile(columns):
    # as kernels/common/launch.py pads; importing it would load triton
    return max(16, 1 << (columns - 1).bit_length())
