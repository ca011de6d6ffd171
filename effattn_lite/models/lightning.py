"""Lightning attention as MiniMax sets it up: SiLU on all three, a weighted norm, a sigmoid gate."""

import torch

from effattn_lite.layers.lightning_attention import LightningAttention


class Lightning(LightningAttention):
    r"""Lightning attention whose decay follows from the layer's place.

    .. math:: y = W_O\,\bigl(\sigma(W_U x) \odot \operatorname{norm}(o)\bigr), \qquad
        g_h = -2^{-8h/H} \Bigl(1 - \frac{l}{L - 1 + 10^{-5}} + 10^{-5}\Bigr)

    Args:
        width: D.
        heads: H.
        place: l, from 0, and L.
        head_dim: K = V; default D / H.
        impl: as in the op.

    Cost: 10 B T D H K FLOPs of projections, plus the op's.
    Cache: the state [N, H, K, V], at least float32; its size does not grow.
    Source: MiniMax 2025, arXiv:2501.08313, and the class of transformers, which has the 1e-5 below the line.
    """

    placed = True
    """The constructor takes `place`."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        place: tuple[int, int],
        head_dim: int | None = None,
        impl: str = "auto",
    ):
        layer, layers = place
        depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        super().__init__(
            width, heads, g=-depth * torch.exp2(-8 / heads * torch.arange(1, heads + 1)), head_dim=head_dim,
            features="qkv", gate="sigmoid", norm_weight=True, impl=impl,
        )  # fmt: skip
