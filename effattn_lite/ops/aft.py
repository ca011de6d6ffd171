"""Attention Free Transformer: an average a channel, weighted by keys and, in the full form, by position."""

import torch

from effattn_lite.ops.common import check_alike, check_cu_seqlens, check_shape, choose_impl
from effattn_lite.ops.engines.elementwise import State, average, average_step

ROWS = 16
"""Queries that the full form handles at a time, unless told otherwise: its table is [B, C, T, D]."""


def aft(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    w: torch.Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    r"""AFT, causal: average values by e^key and a learned bias a pair of positions; q gates the result.

    .. math:: o_t = \sigma(q_t) \odot
        \frac{\sum_{j \le t} e^{k_j + w_{tj}} \odot v_j}{\sum_{j \le t} e^{k_j + w_{tj}}}

    Without w this is AFT-simple: it costs a step a token and carries the two sums, as (a, b, m): a and b
    times e^m, with m the largest key so far. With w no state of fixed size holds the past.

    Args:
        q: queries, [B, T, D], float32, bfloat16 or float16 (float64 with impl="torch").
        k: keys, logarithms of weights, [B, T, D]; with w there may be more of them than queries: the queries
            are then the last of the text.
        v: values, like k.
        w: position biases, [P, P], P at least the longest text; row and column 0 belong to a text's first
            token. None: AFT-simple.
        initial_state: (a, b, m), each [N, D], float32; default zeros; without w.
        output_final_state: return the final (a, b, m) as well; without w.
        cu_seqlens: [N + 1], boundaries of N sequences packed into one batch row (B = 1), empty ones too.
        chunk_size: tokens in a chunk of the torch forms; default 16. The kernel has none.
        impl: "auto", "torch" or "triton", which only AFT-simple has.

    Returns:
        o, [B, T, D], dtype of q; and (a, b, m), each [N, D], float32 (float64 for float64), or None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit, or a state is asked of the full form.
        NotImplementedError: impl="triton" with w.

    Cost: 15 B T D FLOPs and 12 B D bytes of state without w; 7 B T^2 D FLOPs with w.
    Source: Zhai et al. 2021, arXiv:2105.14103. Differs: causal.
    """
    sizes = {}
    check_shape("q", q, "B T D", sizes)
    check_alike("k", k, q)
    if w is None:
        check_shape("k", k, "B T D", sizes)
        o, state = average(
            k, v, **_nothing(k), initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens, chunk_size=chunk_size, impl=impl,
        )  # fmt: skip
        return _gate(q, o), state
    if initial_state is not None or output_final_state:
        raise ValueError("w is given, but a state is asked for: only AFT-simple (w=None) carries one")
    _check_full(q, k, v, w, cu_seqlens, sizes)
    choose_impl(impl, q, refusal="w=None (the full form has no kernel)")
    return _full(q, k, v, w, cu_seqlens, chunk_size or ROWS), None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    state: State,
    out_state: State | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, State]:
    r"""One token of AFT-simple, for decoding.

    .. math:: A_t = A_{t-1} + e^{k_t} v_t, \qquad B_t = B_{t-1} + e^{k_t}, \qquad
        o_t = \sigma(q_t) \odot A_t / B_t

    Args:
        q: query, [N, D].
        k: key, [N, D].
        v: value, [N, D].
        state: (a, b, m), each [N, D], float32.
        out_state: tensors that receive the next (a, b, m); `state` itself updates in place; default new ones.
        impl: "auto", "torch" or "triton" (no gradient).

    Returns:
        o, [N, D], and (a, b, m) after the token.

    Cost: 15 N D FLOPs; reads and writes 12 N D bytes of state.
    Source: Zhai et al. 2021, arXiv:2105.14103.
    """
    check_alike("k", k, q)
    check_shape("k", k, "N D", dict(zip("ND", q.shape, strict=False)))
    o, state = average_step(k, v, **_nothing(k), state=state, out_state=out_state, impl=impl)
    return _gate(q, o), state


def _nothing(k):
    # nothing fades, and a token has no bonus: the average of RWKV-4 with itself included
    zeros = torch.zeros(k.shape[-1], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
    return {"g": zeros, "u": zeros}


def _gate(q, o):
    wide = torch.promote_types(q.dtype, torch.float32)
    # contiguous: the sigmoid rounds alike, however q lies in memory
    return (torch.sigmoid(q.to(wide).contiguous()) * o.to(wide)).to(q.dtype)


def _check_full(q, k, v, w, cu_seqlens, sizes):
    check_shape("k", k, "B Tk D", sizes)
    check_shape("v", v, "B Tk D", sizes, like="k")
    check_alike("v", v, q)
    check_alike("w", w, q, dtype=False)
    check_cu_seqlens(cu_seqlens, sizes["B"], sizes["T"])
    T, Tk = sizes["T"], sizes["Tk"]
    if Tk < T or (cu_seqlens is not None and Tk > T):
        raise ValueError(f"k has {Tk} tokens, expected {T} as q, or more where nothing is packed")
    longest = Tk if cu_seqlens is None else int(cu_seqlens.diff().max())
    if w.ndim != 2 or min(w.shape) < longest:
        raise ValueError(f"w has shape {tuple(w.shape)}, expected [P, P], P >= {longest} tokens of a text")


def _full(q, k, v, w, cu_seqlens, C):
    wide = torch.promote_types(q.dtype, torch.float32)
    kw, vw, w = (x.to(wide) for x in (k, v, w))
    before = k.shape[1] - q.shape[1]
    edges = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = [vw[:, :0]]
    for first, last in zip(edges, edges[1:], strict=False):
        for start in range(before, last - first, C):
            stop = min(start + C, last - first)
            t = torch.arange(stop, device=q.device)
            bias = torch.where(t[start:, None] >= t, w[start:stop, :stop], -torch.inf)
            E = (kw[:, None, first : first + stop] + bias[..., None]).softmax(2)  # [B, C, stop, D]
            # a sum, since autocast would turn a product into bfloat16
            outputs.append((E * vw[:, None, first : first + stop]).sum(2))
    return _gate(q, torch.cat(outputs, dim=1))
