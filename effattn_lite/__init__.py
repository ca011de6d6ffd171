"""Efficient attention: references, kernels, layers, and the book that derives them.

Importing this package loads neither torch nor triton. `METHODS` is the table that ties every
method's name to its rooms: `python -m effattn_lite where retnet` prints one row.
"""

from effattn_lite.registry import CHAPTERS, METHODS

__version__ = "0.1.0"
__all__ = ["CHAPTERS", "METHODS", "__version__"]
