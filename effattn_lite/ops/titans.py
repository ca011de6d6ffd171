"""Titans' neural memory, with a matrix as memory: gradient descent with momentum and forgetting."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl
from effattn_lite.ops.engines.common import check_state, count_after, shift

PARTS = {"M": "N H K V", "P": "N H K V", "M'": "N H K V", "c": "N"}
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def titans(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    mu: torch.Tensor,
    eta: torch.Tensor,
    batch_size: int = 16,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""A memory that learns what surprises it, carries the surprise on, and forgets a share.

    .. math:: P_t = \mu_t P_{t-1} - \eta_t\, k_t\,(M'^\top k_t - v_t)^\top, \qquad
        M_t = e^{g_t} M_{t-1} + P_t, \qquad o_t = s\,M_t^\top q_t

    where M' is the memory after the last whole mini-batch; the bracket times k is the gradient of
    :math:`\tfrac12 \lVert M'^\top k_t - v_t \rVert^2`.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16, float16 or float64.
        k: keys, [B, T, H, K].
        v: values, [B, T, H, V].
        g: log of the share of the memory that a step keeps, [B, T, H], <= 0, any floating dtype.
        mu: share of the momentum that a step keeps, [B, T, H], in [0, 1].
        eta: learning rate of each token, [B, T, H], >= 0.
        batch_size: tokens whose gradients are taken at the same memory.
        scale: s; default 1.
        initial_state: (M, P, M', c), float32: memory, momentum, the memory at the start of the present
            mini-batch, and that one's tokens; default zeros; its gradient is returned.
        output_final_state: return the state after the text as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        impl: "auto" or "torch".

    Returns:
        o, [B, T, H, V], dtype of q; and (M, P, M', c), float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton"; there is no kernel.

    Cost: B T H (2 n (K + V) + 10 K V) FLOPs in mini-batches of n; 12 B H K V bytes of state.
    Source: Behrouz et al. 2025, arXiv:2501.00663. Differs: the paper writes 1 - alpha for e^g, eta for mu and
    theta for the rate; its loss has no half; its memory may be deeper than one matrix.
    """
    sizes = {}
    check_shape("q", q, "B T H K", sizes)
    _check(q, k, v, g, mu, eta, batch_size, "B T", sizes)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    sizes["N"] = sizes["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None:
        check_state("initial_state", initial_state, q, sizes, PARTS)
    choose_impl(impl if impl != "triton" else _no_kernel(), q)
    wide = torch.promote_types(q.dtype, torch.float32)
    # autocast would turn the float32 products into bfloat16
    with torch.autocast(q.device.type, enabled=False):
        tokens = [x.to(wide) for x in (q, k, v, g, mu, eta, torch.ones_like(eta))]
        tokens[0] = tokens[0] if scale is None else scale * tokens[0]
        edges = [0, sizes["T"]] if cu_seqlens is None else cu_seqlens.tolist()
        outputs, states = [tokens[2][:, :0]], []
        for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            mine = initial_state
            if mine is not None and cu_seqlens is not None:
                mine = tuple(x[n : n + 1] for x in mine)
            o, mine = _memorise([x[:, first:last] for x in tokens], mine, batch_size)
            outputs.append(o)
            states.append(mine)
        state = tuple(torch.cat(part) for part in zip(*states, strict=True))
    return torch.cat(outputs, dim=1).to(q.dtype), state if output_final_state else None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    mu: torch.Tensor,
    eta: torch.Tensor,
    state: State,
    batch_size: int = 16,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of Titans' memory, for decoding.

    .. math:: P_t = \mu_t P_{t-1} - \eta_t\, k_t\,(M'^\top k_t - v_t)^\top, \qquad
        M_t = e^{g_t} M_{t-1} + P_t, \qquad o_t = s\,M_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        g: log of the share of the memory that is kept, [N, H].
        mu: share of the momentum that is kept, [N, H].
        eta: learning rate, [N, H].
        state: (M, P, M', c) of the tokens before, float32.
        batch_size: tokens whose gradients are taken at the same memory.
        scale: s; default 1.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto" or "torch".

    Returns:
        o, [N, H, V], and the state after the token.

    Cost: 9 N H K V FLOPs; reads and writes 12 N H K V bytes of state.
    Source: Behrouz et al. 2025, arXiv:2501.00663.
    """
    sizes = {}
    check_shape("q", q, "N H K", sizes)
    _check(q, k, v, g, mu, eta, batch_size, "N", sizes)
    for name, x in (("state", state), ("out_state", out_state)):
        if x is not None:
            check_state(name, x, q, sizes, PARTS)
    o, new = titans(
        q[:, None], k[:, None], v[:, None], g=g[:, None], mu=mu[:, None], eta=eta[:, None],
        batch_size=batch_size, scale=scale, initial_state=state, output_final_state=True, impl=impl,
    )  # fmt: skip
    return o[:, 0], new if out_state is None else tuple(
        a.copy_(b) for a, b in zip(out_state, new, strict=True)
    )


def _no_kernel():
    raise NotImplementedError("titans has no kernel; use impl='torch'")


def _check(q, k, v, g, mu, eta, batch_size, first, sizes):
    tensors = {"k": (k, "H K"), "v": (v, "H V"), "g": (g, "H"), "mu": (mu, "H"), "eta": (eta, "H")}
    for name, (x, axes) in tensors.items():
        check_shape(name, x, f"{first} {axes}", sizes)
        check_alike(name, x, q, dtype=name in "kv")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")


def _memorise(tokens, state, size):
    B, T, H, K = tokens[0].shape
    count, length = None, T
    if state is None:
        M = P = start = tokens[0].new_zeros(B, H, K, tokens[2].shape[-1])
        c = M.new_zeros(B)
    else:
        M, P, start, c = state
        # rows may stop anywhere in a mini-batch: each is shifted so that all begin one together
        count = c.detach().round().long().clamp(0, size - 1)
        length = T + size - 1 if T else 0
        tokens = shift(tokens, count, -(-length // size) * size)
    outputs = []
    for j in range(0, length, size):
        o, M, P = _minibatch([x[:, j : j + size] for x in tokens], M, P, start)
        outputs.append(o)
        # a whole mini-batch: the next one's gradients are taken here
        if count is not None:
            start = torch.where((count + T >= j + size)[:, None, None, None], M, start)
        elif j + size <= T:
            start = M
    o = torch.cat([tokens[2][:, :0], *outputs], dim=1)
    if count is not None and T:
        o = shift([o], -count, T)[0]
    return o, (M, P, start, count_after(c, T, size))


def _minibatch(tokens, M, P, start):
    q, k, v, g, mu, eta, real = tokens
    # a token that is none, of a row that began later or is over, keeps momentum and memory as they are
    keep, carry, real = (x.transpose(1, 2) for x in (g.exp(), mu + 1 - real, real))  # [B, H, C]
    # 1 shares kept between two tokens, and from the start: each row of G and U from the one above
    n = q.shape[1]
    eye = torch.eye(n, device=q.device, dtype=q.dtype)
    gamma, past = keep.cumprod(-1)[..., None], carry.cumprod(-1)[..., None]  # [B, H, C, 1]
    G, U = [eye[0].expand(*keep.shape[:2], n)], [eye[0].expand(*keep.shape[:2], n)]
    for t in range(1, n):
        G.append(keep[..., t, None] * G[-1] + eye[t])
        U.append(carry[..., t, None] * U[-1] + eye[t])
    U = torch.stack(U, dim=-2)  # [B, H, C, C]
    G = torch.stack(G, dim=-2) * real[..., None, :]
    a, L = G @ past, G @ U
    # 2 surprises at the mini-batch's start, and what each weighs for each reader
    W = (eta[..., None] * (v - torch.einsum("bihk,bhkv->bihv", k, start))).transpose(1, 2)
    kt = k.transpose(1, 2)
    # 3 output
    A = torch.einsum("bihk,bhjk->bhij", q, kt) * L
    o = A @ W + gamma * torch.einsum("bihk,bhkv->bhiv", q, M) + a * torch.einsum("bihk,bhkv->bhiv", q, P)
    # 4 memory and momentum after the last token
    M = gamma[..., -1:, :] * M + a[..., -1:, :] * P
    M = M + torch.einsum("bhjk,bhjv->bhkv", kt, L[..., -1, :, None] * W)
    P = past[..., -1:, :] * P + torch.einsum("bhjk,bhjv->bhkv", kt, U[..., -1, :, None] * W)
    return o.transpose(1, 2), M, P
