"""Figures drawn off the screen, as PNG bytes."""

import io
import warnings
from importlib.util import find_spec
from typing import Any

DOTS_PER_INCH = 120


def check_plotting() -> None:
    """Raise ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "a plot needs matplotlib, which is not installed; pip install 'ether-diffusion[evaluate]'"
        )


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of so many inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    file = io.BytesIO()
    with warnings.catch_warnings():  # a script that the font has not is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()
