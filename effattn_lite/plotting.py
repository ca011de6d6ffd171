"""One matplotlib style and one colour a method family, throughout the book."""

from effattn_lite.registry import find

COLORS = {
    "softmax attention": "#4c566a",
    "feature map": "#b5651d",
    "fixed decay": "#0072b2",
    "state space": "#00798c",
    "gated decay": "#2a9d8f",
    "delta rule": "#c1440e",
    "online learning": "#8f2d56",
    "element-wise": "#7a6c5d",
    "memory slots": "#6a4c93",
    "low rank": "#a05195",
    "fixed pattern": "#3a7d44",
    "selected blocks": "#7b8f00",
    "clustering": "#a67c00",
    "uniform model": "#5b7db1",
    "sparse hybrid": "#5f8f6b",
    "linear hybrid": "#b06a5b",
    "advanced hybrid": "#87639a",
}
"""Family -> colour; every one has a contrast of at least 3 : 1 on white."""


def color(name: str) -> str:
    """The colour of a method, which is its family's."""
    return COLORS[find(name).family]


def style() -> None:
    """Set the book's matplotlib style; where matplotlib is missing there is nothing to set."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.rcParams.update(
        {
            "figure.figsize": (6.8, 3.6),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "svg.hashsalt": "effattn_lite",
        }
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")
    except ImportError:
        pass
