r"""S4: a linear time-invariant state space model a channel, run as a recurrence or as one long convolution.

.. math:: h'(\tau) = A\,h(\tau) + B\,x(\tau), \qquad y(\tau) = C\,h(\tau) + D\,x(\tau)

1. Between two tokens lies a time :math:`\Delta`. The bilinear rule takes the mean of both ends for the slope:
   :math:`(I - \tfrac\Delta2 A)\,h_t = (I + \tfrac\Delta2 A)\,h_{t-1} + \Delta B\,x_t`.
2. So :math:`h_t = \bar A h_{t-1} + \bar B x_t`, the same at every token, and the output is a convolution with
   :math:`\bar K_l = C \bar A^l \bar B`.
3. A is a diagonal minus a product of two vectors, :math:`A = \Lambda - P P^*`. An inverse of that shape costs
   M (Woodbury), where a full matrix costs :math:`M^3`.
4. The powers of a matrix in :math:`\bar K` vanish from its generating function,
   :math:`\sum_{l < T} \bar K_l z^l = C\,(I - \bar A^T)(I - \bar A z)^{-1} \bar B` at :math:`z^T = 1`: one
   inverse a root of unity, and of that shape again.

Parameters may be complex: the HiPPO matrix, which remembers the past as the coefficients of polynomials, is
of that shape in a complex basis (`hippo`). The output is the real part.
"""

import numpy as np


def recurrent(x, dt, A, P, B, C, *, D=None, scale=None, initial_state=None):
    r"""S4 token by token: half a step forward with the old state, half a step back to the new one.

    .. math:: h_t = (z - A)^{-1}\bigl((z + A)\,h_{t-1} + 2 B x_t\bigr), \quad z = 2 / \Delta,
        \quad A = \operatorname{Diag}(\Lambda) - P P^*, \qquad y_t = s \operatorname{Re}(C h_t) + D x_t

    Args:
        x: inputs, [B, T, D].
        dt: step size of a channel, [D], > 0.
        A: the diagonal Lambda, [D, M], real part < 0.
        P: what is taken off it as an outer product, [D, M].
        B: what an input writes, [D, M].
        C: what is read, [D, M].
        D: weight of the input in the output, [D]; default 0.
        scale: s; default 1.
        initial_state: h_0, [B, D, M], complex if a parameter is; default zeros.

    Returns:
        y, [B, T, D], and h_T, [B, D, M].

    Cost: B T D (14 M + 3) FLOPs: both products with A 5, write 2, inverse 5, read 2 an entry of the state;
    scale and skip 3. A complex number is one entry.
    Source: Gu et al. 2022, arXiv:2111.00396. Differs: the paper writes N for M; here all states are kept, not
    one of each conjugate pair.
    """
    scale = 1.0 if scale is None else scale
    h = np.zeros((len(x), *A.shape), np.result_type(A, P, B, C)) if initial_state is None else initial_state
    y = np.zeros_like(x)
    z = 2 / dt[:, None]  # [D, 1]
    R, Q = 1 / (z - A), P.conj()
    # Woodbury: (z - Lambda + P P*)^-1 = R - w Q R with w = R P / (1 + Q R P)
    w = R * P / (1 + (Q * R * P).sum(-1, keepdims=True))
    for t in range(x.shape[1]):
        # (z + A) h_{t-1} + 2 B x_t
        u = (z + A) * h - P * np.einsum("dm,bdm->bd", Q, h)[..., None] + 2 * B * x[:, t, :, None]
        u = R * u
        h = u - w * np.einsum("dm,bdm->bd", Q, u)[..., None]
        # y_t = s Re(C h_t)
        y[:, t] = scale * np.einsum("dm,bdm->bd", C, h).real
    return y if D is None else y + D * x, h


def convolution(x, dt, A, P, B, C, *, D=None, scale=None, initial_state=None):
    r"""S4 for all tokens at once: one kernel as long as the text, laid along every diagonal of a matrix.

    .. math:: y_t = s \sum_{j \le t} \operatorname{Re}(\bar K_{t-j})\,x_j
        + s \operatorname{Re}(C \bar A^{t} h_0) + D x_t \quad (t = 1..T), \qquad \bar K_l = C \bar A^l \bar B

    Args and returns: as `recurrent`.

    Cost: B D (2 T^2 + 4 T M + 4 T + 2 M^2 + M) FLOPs, quadratic in T as a matrix, T log T by a Fourier
    transform.
    Source: Gu et al. 2022, arXiv:2111.00396. Differs: takes and returns a state.
    """
    scale = 1.0 if scale is None else scale
    h = np.zeros((len(x), *A.shape), np.result_type(A, P, B, C)) if initial_state is None else initial_state
    T, (step, write) = x.shape[1], discretise(dt, A, P, B)
    # what the state before the text adds to token t, C A^t, and what token t leaves, A^(T - t) B
    rows, columns = [np.einsum("dm,dmn->dn", C, step)], [write]
    for _ in range(T - 1):
        rows.append(np.einsum("dm,dmn->dn", rows[-1], step))
        columns.append(np.einsum("dmn,dn->dm", step, columns[-1]))
    # K_{t-j} on and below the diagonal, 0 above
    lag = np.arange(T)[:, None] - np.arange(T)
    table = np.where((lag >= 0)[..., None], kernel(dt, A, P, B, C, T)[np.maximum(lag, 0)], 0)  # [T, T, D]
    own = np.einsum("tjd,bjd->btd", table, x)
    y = scale * (own + np.einsum("tdm,bdm->btd", np.stack(rows), h).real)
    last = np.einsum("dmn,bdn->bdm", np.linalg.matrix_power(step, T), h)
    h = last + np.einsum("tdm,btd->bdm", np.stack(columns[::-1]), x)
    return y if D is None else y + D * x, h


def step(x, dt, A, P, B, C, *, state, D=None, scale=None):
    r"""One token: the recurrence's body.

    Args:
        x: input, [B, D].
        dt, A, P, B, C, D, scale: as `recurrent`.
        state: h_{t-1}, [B, D, M].

    Returns:
        y, [B, D], and h_t, [B, D, M].

    Cost: B D (14 M + 3) FLOPs.
    Source: Gu et al. 2022, arXiv:2111.00396.
    """
    y, state = recurrent(x[:, None], dt, A, P, B, C, D=D, scale=scale, initial_state=state)
    return y[:, 0], state


def discretise(dt, A, P, B):
    r"""The bilinear rule with full matrices.

    .. math:: \bar A = (I - \tfrac\Delta2 A)^{-1}(I + \tfrac\Delta2 A), \qquad
        \bar B = (I - \tfrac\Delta2 A)^{-1} \Delta B

    Args:
        dt, A, P, B: as `recurrent`.

    Returns:
        A-bar, [D, M, M], and B-bar = (I - dt A / 2)^-1 dt B, [D, M].
    """
    full = np.eye(A.shape[1]) * A[:, None] - P[:, :, None] * P[:, None].conj()
    half = dt[:, None, None] / 2 * full
    back = np.linalg.inv(np.eye(A.shape[1]) - half)
    return back @ (np.eye(A.shape[1]) + half), (back @ (dt[:, None] * B)[..., None])[..., 0]


def kernel(dt, A, P, B, C, T):
    r"""The convolution's kernel, by its generating function at the T-th roots of unity: four sums a root.

    .. math:: \hat K(z) = 2\,\tilde C\,\bigl(g - f A\bigr)^{-1} B, \qquad g = \tfrac2\Delta(1 - z), \quad
        f = 1 + z, \quad \tilde C = C\,(I - \bar A^T)

    With :math:`R = (g - f \Lambda)^{-1}`, a diagonal, the inverse is
    :math:`R - f R P\,(1 + f P^* R P)^{-1} P^* R`.

    Args:
        dt, A, P, B, C: as `recurrent`.
        T: entries of the kernel.

    Returns:
        Re K_l, [T, D].

    Source: Gu et al. 2022, arXiv:2111.00396. Differs: numerator and denominator are multiplied by 1 + z, so
    that z = -1 is no pole.
    """
    power = np.linalg.matrix_power(discretise(dt, A, P, B)[0], T)
    left = C - np.einsum("dm,dmn->dn", C, power)
    z = np.exp(-2j * np.pi * np.arange(T) / T)[:, None, None]  # [T, 1, 1]
    f = 1 + z
    R = 1 / (2 / dt[:, None] * (1 - z) - f * A)  # [T, D, M]

    def cauchy(a, b):
        return (a * R * b).sum(-1)  # [T, D]

    # f leaves with its last axis
    inner = 1 + f[..., 0] * cauchy(P.conj(), P)
    hat = 2 * (cauchy(left, B) - f[..., 0] * cauchy(left, P) / inner * cauchy(P.conj(), B))
    return np.fft.ifft(hat, axis=0).real


def hippo(M):
    r"""HiPPO-LegS as a diagonal minus a rank of one: the state holds the past's Legendre coefficients.

    .. math:: A_{nk} = -\begin{cases} \sqrt{(2n+1)(2k+1)} & n > k \\ n + 1 & n = k \\ 0 & n < k \end{cases},
        \qquad B_n = \sqrt{2n+1}

    Adding :math:`p p^\top` with :math:`p_n = \sqrt{n + 1/2}` leaves :math:`-\tfrac12 I` and a skew-symmetric
    matrix, which a unitary basis makes diagonal.

    Args:
        M: states.

    Returns:
        Lambda, P and B in that basis, [M] each, complex, and the basis, [M, M], its vectors in columns.

    Source: Gu et al. 2022, arXiv:2111.00396, and Gu et al. 2020, arXiv:2008.07669.
    """
    n = np.arange(M)
    b = np.sqrt(2 * n + 1.0)
    p = b / np.sqrt(2)
    A = -np.tril(np.outer(b, b), -1) - np.diag(n + 1.0)
    skew = A + np.outer(p, p) + np.eye(M) / 2
    # i times skew-symmetric is Hermitian: its eigenvalues are real, its vectors orthonormal
    omega, basis = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * omega, basis.conj().T @ p, basis.conj().T @ b, basis


def cost(*, form, B, T, D, M, itemsize=2):
    """FLOPs, bytes and state bytes of one form, the skip D x included.

    FLOPs count 2 for a multiply-add of a product and 1 for any other arithmetic on data, complex or real;
    what is prepared from the parameters alone costs nothing. Bytes: x read once, y written once, the
    parameters read and h_T written once in float32; a complex state takes twice as much.

    Args:
        form: "recurrent" or "convolution".
        B, T, D, M: sizes.
        itemsize: bytes of an entry of x, y.

    Returns:
        dict of "flops", "bytes", "state_bytes".
    """
    state_bytes = 4 * B * D * M
    if form == "recurrent":
        flops = T * (14 * M + 3)
    else:
        # table 2 T^2; read and write 4 T M; sum, scale and skip 4 T; the old state 2 M^2 and its sum M
        flops = 2 * T * T + 4 * T * M + 4 * T + 2 * M * M + M
    moved = itemsize * 2 * B * T * D + 4 * (4 * D * M + 2 * D)
    return {"flops": B * D * flops, "bytes": moved + state_bytes, "state_bytes": state_bytes}
