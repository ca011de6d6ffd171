"""TTT-Linear: the state is a linear model with a layer norm, trained on the tokens as they are read."""

import torch

from effattn_lite.ops.engines import ttt_linear as engine

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ttt_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w: torch.Tensor,
    b: torch.Tensor,
    eta: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    batch_size: int = 16,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""An inner model z + LN(z W + b) learns to turn keys into values while it is read.

    .. math:: W_t = W_{t-1} - \eta_t\, k_t g_t^\top, \qquad b_t = b_{t-1} - \eta_t\, g_t, \qquad
        o_t = s q_t + \mathrm{LN}(s q_t W_t + b_t)
    .. math:: g_t = \frac{\partial}{\partial z}\,\tfrac12 \lVert \mathrm{LN}(z) - (v_t - k_t) \rVert^2
        \quad\text{at}\quad z = k_t W' + b'

    where (W', b') is the inner model after the last whole mini-batch: the size of a mini-batch changes the
    result, unlike that of a chunk.

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K].
        v: values, [B, T, H, K].
        w: inner weights that a text begins with, [H, K, K], any floating dtype; as for the following, its
            gradient is returned.
        b: inner biases that a text begins with, [H, K].
        eta: learning rate of each token's own step, [B, T, H], >= 0.
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.
        initial_state: (S, s, D, d, c), float32; default zeros; its gradient is returned. w + S and b + s are
            the inner model, [N, H, K, K] and [N, H, K]; D and d the part of S and s that its present
            mini-batch of c tokens, [N], has added.
        output_final_state: return the state after the text as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, K], dtype of q; and the state, float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with sizes that no kernel takes.

    Cost: B T H (6 K^2 + 4 n K) FLOPs in mini-batches of n; 8 B H (K^2 + K) bytes of state.
    Source: Sun et al. 2024, arXiv:2407.04620; layer norm, bias and the half in the loss as in the authors'
    released code. Differs: that multiplies all that the t-th token of a mini-batch reads of its steps by a
    learned number, 1/t at first; here a step counts the same for every token after it.
    """
    return engine.ttt_linear(
        q, k, v, w=w, b=b, eta=eta, ln_weight=ln_weight, ln_bias=ln_bias, batch_size=batch_size, scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w: torch.Tensor,
    b: torch.Tensor,
    eta: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    state: State,
    batch_size: int = 16,
    scale: float | None = None,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of TTT-Linear, for decoding.

    .. math:: W_t = W_{t-1} - \eta_t\, k_t g_t^\top, \qquad b_t = b_{t-1} - \eta_t\, g_t, \qquad
        o_t = s q_t + \mathrm{LN}(s q_t W_t + b_t)

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, K].
        w: inner weights that a text begins with, [H, K, K].
        b: inner biases that a text begins with, [H, K].
        eta: learning rate, [N, H].
        ln_weight: weight of the inner layer norm, [H, K].
        ln_bias: bias of the inner layer norm, [H, K].
        state: (S, s, D, d, c) of the tokens before, float32.
        batch_size: tokens whose gradients are taken at the same inner model.
        scale: s; default 1.
        out_state: tensors that receive the next state; `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [N, H, K], and the state after the token.

    Cost: 10 N H K^2 FLOPs; reads and writes 8 N H K^2 bytes of state.
    Source: Sun et al. 2024, arXiv:2407.04620.
    """
    return engine.ttt_linear_step(
        q, k, v, w=w, b=b, eta=eta, ln_weight=ln_weight, ln_bias=ln_bias, state=state, batch_size=batch_size,
        scale=scale, out_state=out_state, impl=impl,
    )  # fmt: skip
