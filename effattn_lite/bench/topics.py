"""Text-like inputs: spans of tokens on one of a few topics, so that selection finds something to select."""

import torch

__all__ = ["add_topics"]


def add_topics(q, k, *, topics=8, span=256, strength=1.75, seed=0):
    """Queries and keys with a vector of their topic added, in place.

    Of normal numbers all blocks weigh alike, and a method that keeps a share of the weight keeps nearly that
    share of the blocks. Here a span of tokens has a topic, drawn for each key head, and tokens of one topic
    answer each other: about 1 / topics of the pairs carry nearly all the weight.

    Args:
        q: [B, T, H, K].
        k: [B, T, HKV, K]; H is a multiple of HKV.
        topics: how many.
        span: tokens in a span.
        strength: of a topic's vector, a multiple of normal numbers.
        seed: of the draw.
    """
    (T, HKV, K), G = k.shape[1:], q.shape[2] // k.shape[2]
    rng = torch.Generator().manual_seed(seed)
    vectors = strength * torch.randn(HKV, topics, K, generator=rng)
    topic = torch.randint(topics, (-(-T // span), HKV), generator=rng)
    # [spans, HKV, K] -> [T, HKV, K]
    text = vectors[torch.arange(HKV), topic].to(k).repeat_interleave(span, dim=0)[:T]
    k += text
    q.unflatten(2, (HKV, G)).add_(text[:, :, None])
