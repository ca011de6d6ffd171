"""Longhorn: every token is one implicit step of an online regression, and the key sets the step size."""

import torch

from effattn_lite.ops.engines.selective_scan import check_tensors, selective_scan, selective_scan_step


def longhorn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Longhorn's recurrence: an entry of the state fades as far as its key and weight say, never below 0.

    .. math:: \varepsilon_t = \frac{\beta_t}{1 + \beta_t\, k_t^\top k_t}, \qquad
        S_t = (1 - k_t^{\odot 2} \varepsilon_t^\top) \odot S_{t-1} + k_t\,(\varepsilon_t \odot v_t)^\top,
        \qquad o_t = s\, S_t^\top q_t

    Args:
        q: queries, [B, T, H, K], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, [B, T, H, K], of any length.
        v: values, [B, T, H, V].
        beta: weight of a value channel's error, [B, T, H, V], >= 0; the paper's is a sigmoid.
        scale: s; default 1.
        initial_state: S_0, [N, H, K, V], float32; default zeros; its gradient is returned.
        output_final_state: return S_T as well; it carries a gradient.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk of the torch form; default 32. It changes no result.
        impl: "auto", "torch" or "triton".

    Returns:
        o, [B, T, H, V], dtype of q; and S_T, [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit.
        NotImplementedError: impl="triton" with K above 256.

    Cost: 7 B T H K V FLOPs recurrent; 4 B H K V bytes of state.
    Source: Liu et al. 2024, arXiv:2407.14207. Differs: the paper has one head and writes x for v;
    convolution, skip and gate are the layer's.
    """
    states = {"initial_state": (initial_state, "N H K V")}
    check_tensors(_named(q, k, v, beta, "B T"), like="q", states=states, cu_seqlens=cu_seqlens)
    return selective_scan(
        q, k, v, beta, scale=1.0 if scale is None else scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
    )  # fmt: skip


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float | None = None,
    out_state: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One token of Longhorn's recurrence, for decoding.

    .. math:: S_t = (1 - k_t^{\odot 2} \varepsilon_t^\top) \odot S_{t-1}
        + k_t\,(\varepsilon_t \odot v_t)^\top, \qquad o_t = s\, S_t^\top q_t

    Args:
        q: query, [N, H, K].
        k: key, [N, H, K].
        v: value, [N, H, V].
        beta: weight of a value channel's error, [N, H, V], >= 0.
        state: S_{t-1}, [N, H, K, V], float32.
        scale: s; default 1.
        out_state: tensor that receives S_t; `state` itself updates in place; default a new one.
        impl: "auto", "torch" or "triton" (one launch, no gradient).

    Returns:
        o, [N, H, V], and S_t, [N, H, K, V].

    Cost: 7 N H K V FLOPs; reads and writes 4 N H K V bytes of state, which is all that counts.
    Source: Liu et al. 2024, arXiv:2407.14207.
    """
    states = {"state": (state, "N H K V"), "out_state": (out_state, "N H K V")}
    check_tensors(_named(q, k, v, beta, "N"), like="q", states=states)
    scale = 1.0 if scale is None else scale
    return selective_scan_step(q, k, v, beta, state=state, scale=scale, out_state=out_state, impl=impl)


def _named(q, k, v, beta, rows):
    return {
        "q": (q, f"{rows} H K", True),
        "k": (k, f"{rows} H K", True),
        "v": (v, f"{rows} H V", True),
        "beta": (beta, f"{rows} H V", False),
    }
