"""Where the sequences of one call lie among tokens and spans, and the tiles of its kernels."""

import torch

from effattn_lite.kernels.common import launch
from effattn_lite.kernels.common.softmax_tuning import candidates


class Sequences:
    """Where the sequences of one call lie among tokens and spans."""

    def __init__(self, q, k, cu_seqlens, spans):
        (self.B, self.T, self.H), (self.NC, self.HKV) = q.shape[:3], k.shape[1:3]
        self.spans, self.cu_seqlens, self.firsts = spans, cu_seqlens, None
        if cu_seqlens is not None:
            self.cu_seqlens = cu_seqlens.contiguous()
            counts = ((cu_seqlens.diff() - spans.size) // spans.stride + 1).clamp(min=0)
            self.firsts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)  # [N + 1]

    def tiles(self, block, *, of_spans=False):
        """The kernels' arguments from `cu_seqlens` to `NT`, for tiles of tokens or of spans."""
        edges, end = (self.firsts, self.NC) if of_spans else (self.cu_seqlens, self.T)
        tiles, NT = None, launch.cdiv(end, block)
        if edges is not None:
            tiles = launch.tile_table(edges, end, block)
            NT = tiles.shape[0]
        return self.cu_seqlens, tiles, self.firsts, self.T, self.spans.tokens, self.NC, NT

    def sizes(self):
        """The arguments from `H` to `scale`."""
        return self.H, self.H // self.HKV, self.spans.size, self.spans.stride, max(self.spans.scale, 1e-30)


def tile_of(kernel, q, v, tuning=None):
    """Tiles of "fwd", "dq" or "dkdv" as keyword arguments, and the options of the launch."""
    K, V = q.shape[3], v.shape[3]
    return sizes_of(tuning or tilings(kernel, launch.capability(q), max(K, V), q.element_size())[0], K, V)


def tilings(kernel, capability, width, itemsize):
    """(BM, BN, warps, stages), best first: those of softmax attention, whose loops these are."""
    return candidates(kernel, capability, launch.padded(width), itemsize)


def sizes_of(tuning, K, V):
    """One tuning for heads of these widths, as `tile_of`."""
    BM, BN, warps, stages = tuning
    tile = dict(K=K, V=V, BK=launch.padded(K), BV=launch.padded(V), BM=BM, BN=BN)
    return tile, dict(num_warps=warps, num_stages=stages)


def select_tile(capability, K, G, n, itemsize):
    """Tiles of the selection: all heads of a group, or as many as fit, are rows beside each other."""
    small = capability != launch.INTERPRETER and (capability < 80 or itemsize == 4)
    rows = 16 if small else 64
    GP = min(launch.power_of_2(G), rows)
    tile = dict(K=K, BK=launch.padded(K), GP=GP, HEADS=launch.cdiv(G, GP), BT=rows // GP, NP=launch.padded(n))
    return tile, dict(num_warps=4, num_stages=2)
