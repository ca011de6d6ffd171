"""The registry's rows, and one more: block-sparse attention, an op under many methods that is none itself."""

from effattn_lite.registry import Method, find, names

__all__ = ["has_kernel", "row_of"]

BLOCK_SPARSE = Method(
    name="block_sparse_attention",
    title="Block-sparse attention",
    family="selected blocks",
    survey="beyond",
    chapter="sparse/prefill_patterns",
    inputs={"q": "B T H K", "k": "B T HKV K", "v": "B T HKV V"},
    options=({"block_size": 8, "share": 0.4},),
    engine="block_sparse",
)
"""Its sets are drawn: `share` of the blocks that a block of queries may see."""


def row_of(name):
    """The row of a method, or of block_sparse_attention.

    Raises:
        ValueError: no row has that name.
    """
    return BLOCK_SPARSE if name == BLOCK_SPARSE.name else find(name)


def has_kernel(name):
    """Whether the method's op has a Triton kernel."""
    return name == BLOCK_SPARSE.name or name in names("kernel")
