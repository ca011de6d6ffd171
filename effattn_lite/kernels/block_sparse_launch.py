"""Launches that build the lists of chosen blocks, and the tiles that fit a block."""

import torch

from effattn_lite.kernels.block_sparse_lists import (
    block_sparse_columns_kernel,
    block_sparse_plan_kernel,
    block_sparse_rows_kernel,
)
from effattn_lite.kernels.common import launch

CHUNK = 256
"""Entries of a row that a program looks at together; the most, since short rows take less."""
COLUMNS = 16
"""Blocks of keys whose lists one program makes: as many bytes as memory moves at least."""
LEAST = 2048
"""Rows of queries, over all heads that share a set, that a program of the keys' gradient takes at least."""
PLACES = 65536
"""Keys that have a place for parts of their gradients."""


class Lists:
    """The sizes of one call, and its lists: `rows` for the queries, `columns` for the keys."""

    def __init__(self, q, k, block_indices, block_mask, cu_seqlens, blocks):
        (self.B, self.T, self.H), self.HKV = q.shape[:3], k.shape[2]
        self.BS, self.QS, self.device = blocks.block_size, blocks.query_block_size, q.device
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.indices, self.n = None, 0
        if block_mask is None:
            self.indices = block_indices.contiguous()
            _, self.R, self.HS, self.n = self.indices.shape
            self.NK = launch.cdiv(self.T, self.BS)
            self.mask = self.empty(self.B, self.HS, self.R, self.NK, dtype=torch.uint8)
        else:
            _, self.HS, self.R, self.NK = block_mask.shape
            self.mask = block_mask.contiguous().view(torch.uint8)
        self.tiles, self.NQ = self._tiles(self.QS)
        self.flags = dict(BS=self.BS, QS=self.QS, CAUSAL=blocks.causal, VARLEN=cu_seqlens is not None)

    def empty(self, *shape, dtype=torch.int32):
        """A tensor beside the inputs."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _tiles(self, block):
        """The table of blocks, if sequences are packed, and how many there are at most."""
        if self.cu_seqlens is None:
            return None, launch.cdiv(self.T, block)
        tiles = launch.tile_table(self.cu_seqlens, self.T, block)
        return tiles, tiles.shape[0]

    def rows(self):
        """Lists of every block of queries: lists, counts, and the arguments that their readers share."""
        cap = self.NK if self.indices is None else min(self.n, self.NK)
        lists = self.empty(self.B, self.HS, self.NQ, cap)
        counts = self.empty(self.B, self.HS, self.NQ, 2)
        C = min(CHUNK, launch.padded(max(self.NK, self.n, 1)))
        block_sparse_rows_kernel[(self.B * self.HS * self.NQ,)](
            self.indices, self.mask, lists, counts, self.cu_seqlens, self.tiles,
            self.T, self.NQ, self.R, self.n, self.HS, self.NK, cap,
            C=C, INDICES=self.indices is not None, **self.flags, num_warps=1,
        )  # fmt: skip
        return lists, counts, self.cu_seqlens, self.tiles, self.T, self.NQ, cap

    def columns(self):
        """Lists of every block of keys, after `rows`: lists, counts, their table, number and length."""
        tiles, NT = self._tiles(self.BS)
        rows = None
        if tiles is not None:
            ends = ((self.cu_seqlens.diff() + self.QS - 1) // self.QS).cumsum(0)
            rows = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)  # [N + 1]
        SETS = self.HS // self.HKV
        cap = SETS * self.NQ
        lists = self.empty(self.B, self.HKV, NT, cap)
        counts = self.empty(self.B, self.HKV, NT, 2)
        block_sparse_columns_kernel[(self.B * self.HKV * launch.cdiv(NT, COLUMNS),)](
            self.mask, lists, counts, self.cu_seqlens, tiles, rows,
            self.T, self.NQ, self.R, self.NK, NT, cap,
            SETS=SETS, C=min(64, launch.padded(self.NQ)), J=COLUMNS, **self.flags, num_warps=4,
        )  # fmt: skip
        return lists, counts, tiles, NT, cap

    def plan(self, counts, cap):
        """Which program takes which entries of the lists of keys: programs, items, starts, places.

        Without one (items is None) every list has a program of its own: none is so long that it must be cut.
        """
        M = counts.numel() // 2
        least = max(1, LEAST // (self.QS * self.H // self.HS))
        if cap <= least:
            return M, None, None, 0
        most = max(2, min(4 * launch.processors(counts), PLACES // self.BS))
        programs = M + most // 2
        items, starts = self.empty(programs, 4), self.empty(M, 2)
        block_sparse_plan_kernel[(1,)](
            counts, items, starts, M, programs, least, most, C=min(1024, launch.padded(M)), num_warps=4
        )
        return programs, items, starts, most


def fit(tile, block):
    """Rows of a tile in a block: a divisor of it if that is not too small, else the block is filled up."""
    divisor = block & -block
    return min(tile, divisor if divisor >= 32 or divisor == block >= 16 else launch.padded(block))
