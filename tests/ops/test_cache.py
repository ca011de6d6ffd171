"""The KV cache: what goes in comes out, views are views, refused calls change nothing."""

import pytest
import torch

from effattn_lite.ops import KVCache
from effattn_lite.ops.engines import decode


def draw(T, *, B=2, HKV=3, K=4, V=5):
    return torch.randn(B, T, HKV, K), torch.randn(B, T, HKV, V)


@pytest.mark.parametrize("first", (0, 1, 7, 30))
@pytest.mark.parametrize("capacity", (None, 30, 64))
def test_appending_equals_joining(first, capacity):
    k, v = draw(30)
    cache = KVCache(k[:, :first], v[:, :first], capacity=capacity)
    for a, b in ((first, first + 1), (first + 1, 30)) if first < 30 else ():
        cache.append(k[:, a:b], v[:, a:b])
    assert len(cache) == 30 and torch.equal(cache.k, k) and torch.equal(cache.v, v)
    assert cache.positions.tolist() == list(range(30))
    cache.append(k[:, 3], v[:, 3])  # one token without its axis
    assert len(cache) == 31 and torch.equal(cache.k[:, 30], k[:, 3]) and torch.equal(cache.v[:, :30], v)


def test_memory_grows_by_doubling():
    k, v = draw(1)
    cache, seen = KVCache(k[:, :0], v[:, :0]), set()
    for _ in range(100):
        cache.append(k, v)
        seen.add(cache.capacity)
    assert seen == {1, 2, 4, 8, 16, 32, 64, 128}


def test_the_cache_is_a_copy():
    k, v = draw(6)
    cache, kept = KVCache(k, v), k.clone()
    k.zero_()
    assert torch.equal(cache.k, kept)


def test_a_new_token_moves_no_other():
    k, v = draw(6)
    cache = KVCache(k, v, capacity=8)
    before = cache.k
    cache.append(k[:, :2], v[:, :2])
    assert cache.k.data_ptr() == before.data_ptr() and cache.capacity == 8


@pytest.mark.parametrize("size", (1, 4, 5, 30, 31))
def test_pages_are_views(size):
    cache = KVCache(*draw(30))
    keys, values = cache.pages(size)
    assert keys.shape == (2, 30 // size, size, 3, 4) and values.shape == (2, 30 // size, size, 3, 5)
    whole = 30 // size * size
    assert torch.equal(keys.flatten(1, 2), cache.k[:, :whole])
    if whole:
        assert keys.data_ptr() == cache.k.data_ptr() and values.data_ptr() == cache.v.data_ptr()
        keys[:, 0, 0] = 7.0
        assert (cache.k[:, 0] == 7).all()


def test_a_summary_is_computed_once_a_page():
    asked = []

    def ranges(pages):
        asked.append(pages.shape[1])
        return decode.bounds(pages)

    k, v = draw(41)
    cache = KVCache(k[:, :10], v[:, :10])
    for t in range(10, 41):
        got = cache.summary("bounds", 4, ranges)
        assert torch.equal(got, decode.bounds(cache.pages(4)[0]))
        cache.append(k[:, t], v[:, t])
    assert sum(asked) == 10 and torch.equal(cache.summary("bounds", 7, ranges)[:, 0, :, :4], k[:, :7].amax(1))


def test_another_source_begins_another_summary():
    cache = KVCache(*draw(8))
    one, two = object(), object()
    first = cache.summary("labels", 1, lambda pages: pages[:, :, 0, :, :2], one)
    same = cache.summary("labels", 1, lambda pages: pages[:, :, 0, :, :1], one)
    other = cache.summary("labels", 1, lambda pages: pages[:, :, 0, :, :1], two)
    assert torch.equal(first, same) and torch.equal(other, cache.k[..., :1])


@pytest.mark.parametrize("n", (0, 1, 6, 13))
def test_what_changes_is_summed_up_anew(n):
    cache, (k, v) = KVCache(*draw(13)), draw(n)
    cache.summary("bounds", 4, decode.bounds)
    old = cache.k.clone()
    cache.rewrite(k, v)
    assert torch.equal(cache.k, torch.cat((old[:, : 13 - n], k), dim=1)) and len(cache) == 13
    assert torch.equal(cache.v[:, 13 - n :], v)
    assert torch.equal(cache.summary("bounds", 4, decode.bounds), decode.bounds(cache.pages(4)[0]))
    cache.truncate(13 - n)
    assert torch.equal(cache.k, old[:, : 13 - n])
    cache.append(*draw(9))
    assert torch.equal(cache.summary("bounds", 4, decode.bounds), decode.bounds(cache.pages(4)[0]))


def test_spans_are_made_once():
    """Each span is made of its own keys, once; what a change reaches, or another source, is made anew."""
    cache, seen, source = KVCache(*draw(13)), [], object()

    def ends(keys):
        seen.append(keys.shape[1])
        return keys[:, 0], keys[:, -1]

    def made(*edges, source=source):
        spans = cache.spans("ends", edges, ends, source)
        for a, b, span in zip(edges, edges[1:], spans, strict=False):
            assert torch.equal(span[0], cache.k[:, a]) and torch.equal(span[1], cache.k[:, b - 1])
        new = seen.copy()
        seen.clear()
        return new

    assert made() == made(3) == []
    assert made(1, 4) == [3] and made(1, 4, 9) == [5] and made(1, 4, 9) == []
    cache.append(*draw(40))
    assert made(1, 4, 9, 50) == [41]
    cache.rewrite(*draw(47))  # tokens 6 on
    assert made(1, 4, 9, 50) == [5, 41]
    cache.truncate(9)
    assert made(1, 4, 9) == [] and made(1, 4, 8) == [4]
    assert made(1, 4, 8, source=None) == [3, 4]


def test_bytes_are_all_that_it_holds():
    """Room for 32 tokens of 3 heads and 4 + 5 numbers, bounds of 4 pages of 8, and spans, 4 bytes each."""
    cache = KVCache(*draw(30), capacity=32)
    assert cache.nbytes == 2 * 32 * 3 * (4 + 5) * 4
    cache.summary("bounds", 8, decode.bounds)
    assert cache.nbytes == 2 * 32 * 3 * (4 + 5) * 4 + 2 * 4 * 3 * 8 * 4
    cache.spans("means", (0, 10, 30), lambda keys: (keys.mean(1), keys[:, 0]))
    assert cache.nbytes == 2 * 32 * 3 * (4 + 5) * 4 + 2 * 4 * 3 * 8 * 4 + 2 * 2 * 2 * 3 * 4 * 4


def test_no_graph_is_kept():
    k, v = (x.requires_grad_() for x in draw(5))
    cache = KVCache(k, v)
    cache.append(k, v)
    assert not cache.k.requires_grad and not cache.summary("bounds", 2, decode.bounds).requires_grad


@pytest.mark.parametrize("method", ("append", "rewrite"))
def test_nothing_is_lost_on_bad_input(method):
    k, v = draw(5)
    cache = KVCache(k, v)
    good = draw(2)
    for bad, error, match in (
        ((good[0], good[1][:, :1]), ValueError, r"v has shape \(2, 1, 3, 5\).*\(2, 2, 3, 5\) as the cache"),
        ((good[0][:1], good[1][:1]), ValueError, r"k has shape \(1, 2, 3, 4\).*\(2, 2, 3, 4\)"),
        ((good[0][..., :3], good[1]), ValueError, r"k has shape.*\(2, 2, 3, 4\)"),
        ((good[0].double(), good[1]), TypeError, "k is torch.float64, expected torch.float32"),
        ((good[0], good[1].to("meta")), ValueError, "v is on meta, expected cpu"),
        ((good[0][:, 0], good[1]), ValueError, r"k has shape \(2, 3, 4\)"),
    ):
        with pytest.raises(error, match=match):
            getattr(cache, method)(*bad)
        assert len(cache) == 5 and torch.equal(cache.k, k) and torch.equal(cache.v, v)


def test_errors():
    k, v = draw(5)
    cache = KVCache(k, v)
    with pytest.raises(ValueError, match="expected at most T = 5"):
        cache.rewrite(*draw(6))
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"length is {length}, expected 0 to T = 5"):
            cache.truncate(length)
    with pytest.raises(ValueError, match="size is 0"):
        cache.pages(0)
    with pytest.raises(ValueError, match="capacity is 4, expected >= T = 5"):
        KVCache(k, v, capacity=4)
    with pytest.raises(ValueError, match=r"v has shape \(2, 4, 3, 5\)"):
        KVCache(k, v[:, :4])
    with pytest.raises(TypeError, match="v is torch.float16"):
        KVCache(k, v.half())
