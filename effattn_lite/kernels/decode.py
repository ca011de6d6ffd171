"""Attention of one new token: a tile of the query heads that share their keys, over a list of pages.

The heads of a set, padded to 16, are the rows of the tile, so one reading of the keys serves them all. Too
few sets keep a GPU busy: their lists are cut into parts, whose softmaxes a second kernel joins, in order.
A token is a page of size 1, and the whole cache needs no list. float32 inputs use float32 products ("ieee").
"""

import torch
import triton
import triton.language as tl

from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax import online_step
from effattn_lite.kernels.common.tile import load_tile, store_tile
from effattn_lite.kernels.decode_score import page_scores_kernel

# capability -> width of the wider head -> (BN, warps, stages); by registers and shared memory
HALF = {
    launch.INTERPRETER: {256: (32, 4, 1)},
    75: {128: (32, 4, 1), 256: (16, 4, 1)},
    80: {128: (64, 4, 3), 256: (32, 4, 3)},
    86: {128: (64, 4, 2), 256: (32, 4, 2)},
    90: {128: (64, 4, 3), 256: (32, 4, 3)},
    120: {128: (64, 4, 2), 256: (32, 4, 2)},
}
FLOAT = {
    launch.INTERPRETER: HALF[launch.INTERPRETER],
    75: {64: (32, 4, 1), 128: (16, 4, 1)},
    80: {64: (32, 4, 2), 128: (32, 4, 1), 256: (16, 4, 1)},
}
HEADS = 32
"""Query heads of a set that a program takes at most."""
PARTS = 64
"""Parts that a list of keys is cut into at most."""
SCORES = dict(BN=64, BC=32)
"""Pages and features of a tile of scores."""
ROWS = 64
"""Queries of a tile of scores at most."""


def tuning(capability: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """(BN, warps, stages) for a GPU and head width."""
    by_width = launch.choose(HALF if itemsize == 2 else FLOAT, capability)
    return by_width[min(w for w in by_width if w >= width)]


@triton.jit(do_not_specialize=["T", "Tk", "N", "L", "NS", "R"])
def decode_fwd_kernel(
    q, k, v, pages, o, lse, T, Tk, N, L, NS, R, NM, H, HS, HG, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, P: tl.constexpr, PAGED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """o [BM, V] and lse [BM] of one set's heads over L of its N keys; with SPLIT as exponents of 2."""
    i_s, i_r = tl.program_id(0) % NS, tl.program_id(0) // NS
    i_m, i_r = i_r % NM, i_r // NM
    i_h, i_b, i_t = i_r % HS, (i_r // HS // T).to(tl.int64), (i_r // HS % T).to(tl.int64)
    i_q = i_h * G + i_m * BM  # the tile's first query head
    position = (Tk - T + i_t).to(tl.int32)
    q += i_b * q_b + i_t * q_t + i_q * q_h
    k += i_b * k_b + i_q // HG * k_h
    v += i_b * v_b + i_q // HG * v_h
    b_q = load_tile(q, q_h, G - i_m * BM, K, BM, BK, True)
    b_o, b_l = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    o_n, o_k, o_v = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BV)
    end = tl.minimum((i_s + 1) * L, N)
    if PAGED:
        pages += i_r.to(tl.int64) * (N // P)
    else:
        end = tl.minimum(end, position + 1)
    factor = scale * 1.4426950408889634  # exp(x) = exp2(factor x)
    # [sketch:fwd]
    for i_n in range(i_s * L, end, BN):
        o_j = i_n + o_n  # a place in the list, then a token
        see = o_j < end
        if PAGED:
            b_page = tl.load(pages + o_j // P, mask=see, other=-1)
            o_j = b_page * P + o_j % P
            see = (b_page >= 0) & (o_j <= position)
        o_j = tl.where(see, o_j, 0).to(tl.int64)
        b_k = tl.load(
            k + o_j[:, None] * k_t + o_k[None, :], mask=see[:, None] & (o_k < K)[None, :], other=0.0
        )
        b_v = tl.load(
            v + o_j[:, None] * v_t + o_v[None, :], mask=see[:, None] & (o_v < V)[None, :], other=0.0
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_s = tl.where(see[None, :], b_s, float("-inf"))
        b_o, b_m, b_l = online_step(b_o, b_m, b_l, b_s, b_v, factor, True)
    # [/sketch:fwd]
    b_full = tl.where(b_l == 0, 1.0, b_l)
    b_lse = tl.where(b_l == 0, float("-inf"), b_m + tl.log2(b_full))
    if not SPLIT:
        b_lse = b_lse * 0.6931471805599453
    row = (i_b * T + i_t) * H + i_q + tl.cast(i_s, tl.int64) * R
    store_tile(o + row * V, b_o / b_full[:, None], V, G - i_m * BM, V, BM, BV)
    o_m = tl.arange(0, BM)
    tl.store(lse + row + o_m, b_lse, mask=o_m < G - i_m * BM)


@triton.jit(do_not_specialize=["NS", "R"])
def decode_merge_kernel(o_part, lse_part, o, lse, NS, R, V: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr):
    """One row's o [V] and lse from its NS parts, each the softmax of other keys."""
    i_r, o_s, o_v = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, BV)
    # [sketch:merge]
    b_e = tl.load(lse_part + o_s.to(tl.int64) * R + i_r, mask=o_s < NS, other=float("-inf"))
    b_m = tl.max(b_e, 0)
    b_w = tl.exp2(b_e - tl.where(b_m == float("-inf"), 0.0, b_m))  # weight of a part
    b_l = tl.sum(b_w, 0)
    b_full = tl.where(b_l == 0, 1.0, b_l)
    p_o = o_part + (o_s.to(tl.int64)[:, None] * R + i_r) * V + o_v[None, :]
    b_o = tl.load(p_o, mask=(o_s < NS)[:, None] & (o_v < V)[None, :], other=0.0)
    b_o = tl.sum(b_w[:, None] * b_o, 0) / b_full
    # [/sketch:merge]
    tl.store(o + i_r * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)
    b_lse = tl.where(b_l == 0, float("-inf"), (b_m + tl.log2(b_full)) * 0.6931471805599453)
    tl.store(lse + i_r, b_lse)


def forward(q, k, v, pages, page_size, scale, *, parts=None):
    """o [B, T, H, V] and lse [B, T, H]; `parts` overrides how many a list is cut into."""
    (B, T, H, K), (_, Tk, HKV, V) = q.shape, v.shape
    q, k, v = map(launch.readable, (q, k, v))
    o = torch.empty((B, T, H, V), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, H), dtype=torch.float32, device=q.device)
    if not o.numel():
        return o, lse.fill_(float("-inf"))
    paged = pages is not None
    HS, N = (pages.shape[2], pages.shape[3] * page_size) if paged else (HKV, Tk)
    G, R = H // HS, B * T * H
    BN, warps, stages = tuning(
        launch.capability(q), max(launch.padded(K), launch.padded(V)), q.element_size()
    )
    BM = min(launch.padded(G), HEADS)
    NM = launch.cdiv(G, BM)
    NS, L = _cut(N, BN, B * T * HS * NM, parts or launch.processors(q), exact=parts is not None)
    to = (o, lse)
    if NS > 1:
        to = tuple(torch.empty((NS, *x.shape), dtype=torch.float32, device=q.device) for x in (o, lse))
    with launch.on_device(q):
        decode_fwd_kernel[(NS * NM * B * T * HS,)](
            q, k, v, pages.contiguous() if paged else None, *to, T, Tk, N, L, NS, R, NM, H, HS, H // HKV,
            max(scale, 1e-30), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            G=G, K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=BN,
            P=page_size if paged else 1, PAGED=paged, SPLIT=NS > 1, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if NS > 1:
            decode_merge_kernel[(R,)](
                *to, o, lse, NS, R, V=V, BV=launch.padded(V), BS=launch.power_of_2(NS), num_warps=4
            )
    return o, lse


def _cut(N, BN, rows, processors, exact=False):
    """Parts of a list of N keys, and keys in a part: two programs a processor, and two tiles a part."""
    wanted = processors if exact else launch.cdiv(2 * processors, rows)
    most = launch.cdiv(N, BN if exact else 2 * BN)
    L = launch.cdiv(launch.cdiv(N, max(1, min(wanted, most, PARTS))), BN) * BN
    return max(1, launch.cdiv(N, L or 1)), L


def page_scores(queries, features, *, dot=None):
    """Scores [B, T, HS, P] float32 of features [B, P, HKV, F] for queries [B, T, HS, F].

    One query of a key head needs no matrix product, and the interpreter's breaks ties; `dot` overrides that.
    """
    (B, T, H, F), (_, P, HKV, _) = queries.shape, features.shape
    queries, features = launch.readable(queries), launch.readable(features)
    s = torch.empty((B, T, H, P), dtype=torch.float32, device=queries.device)
    if s.numel():
        G, BN = H // HKV, SCORES["BN"]
        dot = T * G > 1 and s.is_cuda if dot is None else dot
        BM = min(launch.padded(T * G) if dot else launch.power_of_2(T * G), ROWS)
        NT, NM = launch.cdiv(P, BN), launch.cdiv(T * G, BM)
        with launch.on_device(s):
            page_scores_kernel[(NT * NM * B * HKV,)](
                queries, features, s, T, P, NT, NM, H, HKV, *queries.stride()[:3], *features.stride()[:3],
                F=F, G=G, BM=BM, BN=BN, BC=min(SCORES["BC"], launch.padded(F)), DOT=dot,
                num_warps=4, num_stages=2,
            )  # fmt: skip
    return s


def variants(capability=80):
    """Compilations that stand for all: (name, kernel, signature, constants, options), by capability."""
    for kind, width, G, P in (
        ("fp16", 128, 1, 16), ("fp16", 128, 7, 1), ("bf16", 256, 16, 16), ("fp16", 64, 128, 0),
        ("fp32", 128, 4, 16), *((("fp32", 256, 32, 1),) if capability >= 80 else ()),
    ):  # fmt: skip
        BN, warps, stages = tuning(capability, width, 4 if kind == "fp32" else 2)
        BM = min(launch.padded(G), HEADS)
        constants = dict(
            G=G, K=width, V=width, BK=width, BV=width, BM=BM, BN=BN, P=P or 1, PAGED=P > 0, SPLIT=P > 0
        )
        title = f"{kind}-{width}-G{G}-P{P}"
        yield _variant(f"fwd-{title}", decode_fwd_kernel, kind, constants, warps, stages)
        yield _variant(f"merge-{title}", decode_merge_kernel, kind, dict(V=width, BV=width, BS=PARTS), 4, 1)
        rows = 1 if G == 1 else BM if G < 16 else ROWS
        constants = dict(F=2 * width, G=G, BM=rows, **SCORES, DOT=rows > 1)
        yield _variant(f"scores-{title}", page_scores_kernel, kind, constants, 4, 2)


def _variant(title, kernel, kind, constants, warps, stages):
    narrow = ("q", "k", "v", "a", "w") if kernel is not decode_merge_kernel else ("o",)
    wide = ("o", "s", "lse", "o_part", "lse_part")
    types = dict.fromkeys(wide, "*fp32") | dict.fromkeys(narrow, f"*{kind}")
    types |= {"pages": "*i32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    if not constants.get("SPLIT", True):
        types["o"] = f"*{kind}"
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names}
    return title, kernel, signature, constants, dict(num_warps=warps, num_stages=stages)
