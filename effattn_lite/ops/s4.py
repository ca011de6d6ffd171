"""S4: a time-invariant state space model a channel; convolution in a chunk, recurrence between chunks."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl

CHUNK = 128
"""Default chunk: its kernel and its powers of A-bar are made once a call, by doubling."""


def s4(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""A state space model a channel, discretised by the bilinear rule, the same at every token.

    .. math:: h_t = \bar A h_{t-1} + \bar B x_t, \qquad y_t = s \operatorname{Re}(C h_t) + D x_t, \qquad
        \bar A = (I - \tfrac\Delta2 A)^{-1}(I + \tfrac\Delta2 A), \quad
        \bar B = (I - \tfrac\Delta2 A)^{-1} \Delta B

    with :math:`A = \operatorname{Diag}(\Lambda) - P P^*`. Inside a chunk that is a convolution with
    :math:`\bar K_l = C \bar A^l \bar B`, by Fourier transform. The parameters are prepared in float64.

    Args:
        x: inputs, [B, T, D], float32, bfloat16 or float16 (float64 too).
        dt: step size of a channel, [D], > 0.
        A: the diagonal Lambda, [D, M], real part < 0, real or complex as P, B and C.
        P: what is taken off it as an outer product, [D, M].
        B: what an input writes, [D, M].
        C: what is read, [D, M]; a model with conjugate pairs of states has all of them.
        D: weight of the input in the output, [D]; default none.
        scale: s; default 1.
        initial_state: h_0, [N, D, M], float32, or complex64 if a parameter is complex; default zeros.
        output_final_state: return h_T as well.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk; default 128. It changes no result.
        impl: "auto" or "torch"; it has no kernel of its own.

    Returns:
        y, [B, T, D], dtype of x; and h_T, [N, D, M], as the initial state (wide for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton".

    Cost: B T D (4 M + O(log C)) FLOPs in chunks of C, and O(D M^2 (C + M log C)) once a call for the powers,
    which are 2 D M C numbers; 4 B D M bytes of state, 8 if complex.
    Source: Gu et al. 2022, arXiv:2111.00396. Differs: the kernel spans a chunk, made by doubling powers;
    the paper's spans the text and is made of Cauchy sums; all conjugate states are kept.
    """
    parameters = _check(x, dt, A, P, B, C, D, "B T D")
    N = x.shape[0]
    check_cu_seqlens(cu_seqlens, N, x.shape[1])
    N = N if cu_seqlens is None else cu_seqlens.numel() - 1
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    _refuse(impl, x)
    kind = _kind(x, parameters)
    _check_state("initial_state", initial_state, (N, *A.shape), x, kind)
    wide = torch.promote_types(x.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(x.device.type, enabled=False):
        h = x.new_zeros(N, *A.shape, dtype=kind) if initial_state is None else initial_state
        xw, edges = x.to(wide), [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        # no longer than the longest sequence, and one token at least
        size = min(chunk_size or CHUNK, max([1, *(b - a for a, b in zip(edges, edges[1:], strict=False))]))
        plan = _Plan(*parameters, size, wide, kind)
        outputs, states = [xw[:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            # without cu_seqlens all rows of the batch go together
            state = h if cu_seqlens is None else h[n : n + 1]
            for start in range(first, last, plan.size):
                y, state = plan.chunk(xw[:, start : min(start + plan.size, last)], state)
                outputs.append(y)
            states.append(state)
        y = (1.0 if scale is None else scale) * torch.cat(outputs, dim=1)
        y = y if D is None else y + D.to(wide) * xw
    return y.to(x.dtype), torch.cat(states) if output_final_state else None


def step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    state: torch.Tensor,
    D: torch.Tensor | None = None,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of S4, for decoding: its inverse is a diagonal and a product of two vectors.

    .. math:: h_t = (z - A)^{-1}\bigl((z + A)\,h_{t-1} + 2 B x_t\bigr), \quad z = 2 / \Delta, \qquad
        y_t = s \operatorname{Re}(C h_t) + D x_t

    Args:
        x: input, [N, D].
        dt, A, P, B, C, D: as in `s4`.
        state: h_{t-1}, [N, D, M], float32 or complex64.
        scale: s; default 1.
        out_state: tensor that receives h_t; `state` itself updates in place; default a new one.
        impl: "auto" or "torch".

    Returns:
        y, [N, D], and h_t, [N, D, M].

    Cost: 14 N D M FLOPs; reads and writes the state, and reads the parameters.
    Source: Gu et al. 2022, arXiv:2111.00396.
    """
    parameters = _check(x, dt, A, P, B, C, D, "N D")
    _refuse(impl, x)
    kind = _kind(x, parameters)
    for name, h in (("state", state), ("out_state", out_state)):
        _check_state(name, h, (len(x), *A.shape), x, kind)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        xw, C = x.to(wide), C.to(kind)
        h = _advance(*(p.to(kind) for p in parameters[:-1]), state, xw)
        y = (1.0 if scale is None else scale) * torch.einsum("dm,ndm->nd", C, h).real
        y = y if D is None else y + D.to(wide) * xw
    return y.to(x.dtype), h if out_state is None else out_state.copy_(h)


class _Plan:
    """What a chunk needs of the parameters: kernel, powers of A-bar before C and after B-bar."""

    def __init__(self, dt, A, P, B, C, size, wide, kind):
        self.size, self.wide, self.kind = size, wide, kind
        # I - A-bar^n cancels where steps are small: float64
        exact = torch.promote_types(kind, torch.float64)
        dt, A, P, B, C = (p.to(exact) for p in (dt, A, P, B, C))
        one, none = torch.eye(A.shape[1], dtype=exact, device=A.device), A.new_zeros(1, len(A))
        # A-bar column by column, [D, M, M], and B-bar, [D, M, 1]
        self.step = _advance(dt, A, P, B, one[:, None], none).permute(1, 2, 0)
        write = _advance(dt, A, P, B, A.new_zeros(1, *A.shape), none + 1)[0, ..., None]
        read, power = C[:, None] @ self.step, self.step
        while read.shape[1] < size:
            # twice as many powers: A^(n + l) = A^n A^l
            read = torch.cat((read, read @ power), dim=1)
            write = torch.cat((write, power @ write), dim=2)
            power = power @ power
        self.read = read[:, :size].to(kind)  # [D, C, M], C A-bar^(l+1)
        self.write = write[..., :size].to(kind)  # [D, M, C], A-bar^l B-bar
        self.kernel = torch.einsum("dm,dml->ld", C, write[..., :size]).real.to(wide)
        self.powers = {}

    def power(self, n):
        if n not in self.powers:
            self.powers[n] = torch.linalg.matrix_power(self.step, n).to(self.kind)
        return self.powers[n]

    def chunk(self, x, h):
        n = x.shape[1]
        if not len(x):
            # a Fourier transform wants something to transform
            return x, h
        # twice the length: a circular convolution whose wrap falls on zeros
        spectrum = torch.fft.rfft(x, 2 * n, dim=1) * torch.fft.rfft(self.kernel[:n], 2 * n, dim=0)
        own = torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n]
        past = torch.einsum("dim,bdm->bid", self.read[:, :n], h).real
        left = torch.einsum("dmi,bid->bdm", self.write[..., :n].flip(-1), x.to(self.kind))
        return own + past, torch.einsum("dmk,bdk->bdm", self.power(n), h) + left


def _advance(dt, A, P, B, h, x):
    """The state after input x [N, D], from h [N, D, M]: (z - A)^-1 ((z + A) h + 2 B x), by Woodbury."""
    z, Q = 2 / dt[:, None], P.conj()
    R = 1 / (z - A)
    u = R * ((z + A) * h - P * (Q * h).sum(-1, keepdim=True) + 2 * B * x[..., None])
    w = R * P / (1 + (Q * R * P).sum(-1, keepdim=True))
    return u - w * (Q * u).sum(-1, keepdim=True)


def _check(x, dt, A, P, B, C, D, axes):
    sizes = {}
    check_shape("x", x, axes, sizes, "x")
    named = {"dt": dt, "A": A, "P": P, "B": B, "C": C, "D": D}
    for name, parameter in named.items():
        if parameter is not None:
            check_shape(name, parameter, "D" if name in ("dt", "D") else "D M", sizes, "x and A")
            check_alike(name, parameter, x, dtype=False, like="x")
    return dt, A, P, B, C


def _refuse(impl, x):
    if impl == "triton":
        raise NotImplementedError("s4 has no kernel for impl='triton'; use impl='torch'")
    choose_impl(impl, x)


def _kind(x, parameters):
    wide = torch.promote_types(x.dtype, torch.float32)
    return wide.to_complex() if any(p.is_complex() for p in parameters) else wide


def _check_state(name, state, shape, x, kind):
    if state is None:
        return
    if state.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(state.shape)}, expected [N, D, M] = {tuple(shape)} as x and A"
        )
    check_alike(name, state, x, dtype=False, like="x")
    if state.dtype != kind:
        raise TypeError(f"{name} is {state.dtype}, expected {kind}, since states are kept wide")
