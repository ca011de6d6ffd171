"""Launches that build the lists of a call, and the tiles that fit its heads."""

import torch

from effattn_lite.kernels.block_sparse_launch import COLUMNS, Lists, fit
from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax_tuning import candidates
from effattn_lite.kernels.token_sparse_lists import token_sparse_columns_kernel, token_sparse_rows_kernel

ENTRIES = 2048
"""Entries of the mask that a program looks at together."""
ROWS = 64
"""Rows of a tile of neighbouring tokens: more of them share fewer blocks."""


class TokenLists(Lists):
    """The sizes of one call, and its lists: `rows` for tiles of tokens, `columns` for the keys."""

    def __init__(self, q, k, block_indices, block_mask, cu_seqlens, blocks):
        (self.B, self.T, self.H), (_, self.Tk, self.HKV, _) = q.shape[:3], k.shape
        self.BS, self.QS, self.device = blocks.block_size, 1, q.device
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.indices, self.n = None, 0
        if block_mask is None:
            self.indices = block_indices[:, : self.T].contiguous()
            self.HS, self.n = self.indices.shape[2:]
            self.NK = launch.cdiv(self.Tk, self.BS)
            self.mask = self.empty(self.B, self.HS, self.T, self.NK, dtype=torch.uint8)
        else:
            self.mask = block_mask[:, :, : self.T].contiguous().view(torch.uint8)
            _, self.HS, _, self.NK = self.mask.shape
        self.GS = self.H // self.HS
        self.flags = dict(BS=self.BS, CAUSAL=blocks.causal, VARLEN=cu_seqlens is not None)

    def rows(self, BT):
        """Lists of tiles of BT tokens: the arguments from `mask` to `HS` of the kernels that read them."""
        tiles, NQ = None, launch.cdiv(self.T, BT)
        if self.cu_seqlens is not None:
            tiles = launch.tile_table(self.cu_seqlens, self.T, BT)
            NQ = tiles.shape[0]
        cap = self.NK if self.indices is None else min(BT * self.n, self.NK)
        lists = self.empty(self.B, self.HS, NQ, cap)
        counts = self.empty(self.B, self.HS, NQ, 2)
        R = launch.power_of_2(BT)
        C = min(ENTRIES // R, 256, launch.padded(max(self.NK, self.n)))
        token_sparse_rows_kernel[(self.B * self.HS * NQ,)](
            self.indices, self.mask, lists, counts, self.cu_seqlens, tiles,
            self.T, self.Tk, NQ, self.n, self.HS, self.NK, cap,
            BT=BT, R=R, C=C, INDICES=self.indices is not None, **self.flags,
            num_warps=1 if R * C <= 256 else 4,
        )  # fmt: skip
        where = self.cu_seqlens, tiles, self.T, self.Tk, NQ, self.NK, cap
        return (self.mask, lists, counts, *where, self.H, self.H // self.HKV, self.HS)

    def columns(self):
        """Lists of every block of keys, after `rows`: lists, counts, their table, number and length.

        Entry g T + t is token t of its sequence, in the g-th set of the key head.
        """
        tiles, NT = None, launch.cdiv(self.Tk, self.BS)
        if self.cu_seqlens is not None:
            tiles = launch.tile_table(self.cu_seqlens, self.T, self.BS)
            NT = tiles.shape[0]
        cap = self.HS // self.HKV * self.T
        lists = self.empty(self.B, self.HKV, NT, cap)
        counts = self.empty(self.B, self.HKV, NT, 2)
        token_sparse_columns_kernel[(self.B * self.HKV * launch.cdiv(NT, COLUMNS),)](
            self.mask, lists, counts, self.cu_seqlens, tiles, self.T, self.Tk, self.NK, NT, cap,
            SETS=self.HS // self.HKV, C=min(64, launch.padded(self.T)), J=COLUMNS, **self.flags, num_warps=4,
        )  # fmt: skip
        return lists, counts, tiles, NT, cap


def tuning_of(kernel, q, v):
    """(BM, BN, warps, stages) of a GPU and head width: those of softmax attention, whose loops these are."""
    width = max(launch.padded(q.shape[3]), launch.padded(v.shape[3]))
    return candidates(kernel, launch.capability(q), width, q.element_size())[0]


def tile_of(kernel, tuning, K, V, BS, GS):
    """Tiles that fit the blocks and heads, as keyword arguments, and the options of the launch.

    A token whose heads fill a tile of 16 rows has one for itself; others share it with their neighbours.
    """
    BM, BN, warps, stages = tuning[0], fit(tuning[1], BS), *tuning[2:]
    tile = dict(K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BN=BN)
    if kernel == "dkdv":
        warps = max(min(warps, 4), warps * BN // tuning[1])
        return tile | dict(BM=BM, GS=GS), dict(num_warps=warps, num_stages=stages)
    BM = min(BM, launch.padded(GS) if GS >= 16 else ROWS)
    tile |= dict(BM=BM, BT=1 if GS >= 16 else BM // GS, GS=GS)
    return tile, dict(num_warps=max(min(warps, 4), warps * BM // tuning[0]), num_stages=stages)
