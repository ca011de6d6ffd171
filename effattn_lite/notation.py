"""The letters of the book: one letter a meaning, in code, docstrings, figures and formulas."""

AXES = {
    "B": "batch: independent sequences of equal length",
    "N": "packed sequences: N sequences of any length laid end to end in one batch row",
    "T": "tokens of a sequence",
    "H": "query heads (and key heads, in linear ops)",
    "HV": "value heads of a linear op; a multiple of H",
    "HKV": "key/value heads of a softmax or sparse op; H is a multiple of it",
    "K": "key dimension of one head",
    "V": "value dimension of one head",
    "D": "model width",
    "M": "features or memory slots of one head; states of one channel in Mamba",
    "C": "tokens in a chunk",
    "NC": "chunks of a sequence, ceil(T / C)",
    "W": "tokens in a sliding window, the query's own included",
    "BS": "tokens in a block of a sparse pattern",
    "L": "layers",
}
"""Sizes. A shape is written with them: q is [B, T, H, K]."""

TENSORS = {
    "q": ("queries", "[B, T, H, K]"),
    "k": ("keys", "[B, T, H, K], or HKV heads in softmax and sparse ops"),
    "v": ("values", "[B, T, H, V], or HKV heads in softmax and sparse ops"),
    "o": ("outputs", "[B, T, H, V]"),
    "S": ("state of a linear recurrence, read as o = q S", "[B, H, K, V]"),
    "g": ("log decay, <= 0; exp(g) is what one step keeps", "[H], [H, K], [B, T, HV] or [B, T, HV, K]"),
    "beta": ("write strength", "[B, T, HV]; [B, T, H, V] in Longhorn"),
    "u": ("bonus of the current token (RWKV)", "[H, K]"),
    "A": ("scores inside a chunk", "[B, H, C, C]"),
    "lse": ("log-sum-exp of a row of scores", "[B, T, H]"),
    "dq": ("gradient of the loss with respect to q; likewise dk, dv, dS", "shape of q"),
}
"""Tensors: name -> (meaning, shape)."""

SYMBOLS = {
    r"\mathbf q_t, \mathbf k_t, \mathbf v_t": "query, key and value of token t, as column vectors",
    r"\mathbf S_t": "state after token t, K by V; the read-out is o_t = S_t^T q_t",
    r"\alpha_t = e^{g_t}": "decay: the share of the state that step t keeps",
    r"\gamma": "a decay that does not depend on the token",
    r"\beta_t": "write strength",
    r"s": "score scale, 1 / sqrt(K) unless a method says otherwise",
    r"\odot": "element-wise product",
    r"\operatorname{Diag}(\mathbf a)": "diagonal matrix with a on its diagonal",
    r"\sigma(x)": "logistic sigmoid, 1 / (1 + e^{-x})",
}
"""Symbols of formulas, as LaTeX."""
