"""flash-linear-attention's MoBA and NSA on this package's inputs: peers of two sparse methods.

As in `fla_peers`, each builder returns (label, call); these take the method's options too. fla is imported
inside.
"""

import torch

__all__ = ["SPARSE"]


def _moba(options, q, k, v):
    from fla.ops.moba import parallel

    if parallel.flash_attn_varlen_func is None:
        _lend_attention(parallel)
    T = q.shape[1]
    edges = torch.tensor([0, T], dtype=torch.int32, device=q.device)
    return (
        "fla parallel_moba",
        lambda: parallel.parallel_moba(q, k, v, edges, T, options["block_size"], options["top_k"]),
    )


def _nsa(options, q, k, v, g_cmp, g_slc, g_win):
    from fla.ops.nsa import parallel_nsa

    # its window is flash-attn's kernel, which comes with another package
    return (
        "fla parallel_nsa, without the window",
        lambda: parallel_nsa(
            q, k, v, g_cmp, g_slc, None,
            block_counts=options.get("top_n", 16), block_size=options.get("block_size", 64),
        ),
    )  # fmt: skip


def _lend_attention(parallel):
    """FlashAttention-2 as torch has it, under the names that fla's MoBA imports from flash-attn."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, **_
    ):  # fmt: skip
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            0.0, causal, False, scale=softmax_scale,
        )[:4]  # fmt: skip

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, **_,
    ):  # fmt: skip
        none = torch.zeros(2, dtype=torch.int64, device=q.device)  # of a dropout that does not happen
        found = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            0.0, causal, none, none, scale=softmax_scale,
        )  # fmt: skip
        for x, new in zip((dq, dk, dv), found, strict=True):
            x.copy_(new)

    parallel._flash_attn_varlen_forward = forward
    parallel._flash_attn_varlen_backward = backward
    parallel.flash_attn_varlen_func = lambda *tensors, causal: forward(*tensors, causal=causal)[0]


SPARSE = {"moba": _moba, "nsa": _nsa}
"""Method -> builder."""
