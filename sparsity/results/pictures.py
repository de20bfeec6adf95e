"""What all pictures have in common: one look on every machine, texts as they were typed, no warnings of a library's."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsity.files import whole

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # Tol's bright ones

FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC")
FONTS += ("Hiragino Sans", "Malgun Gothic", "Arial Unicode MS")  # the later ones for what the first one lacks


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib by its own defaults, whatever a user's matplotlibrc says; what it warns of changes no number."""
    import matplotlib
    from matplotlib import font_manager

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its font cache
    installed = {font.name for font in font_manager.fontManager.ttflist}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that no font has is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.family"] = [name for name in FONTS if name in installed]
        yield


def as_typed(text: str) -> str:
    """A text without formulas: a dollar sign is one. Bytes of a file's name that are no text become ?."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def percent(value: float, position: int | None = None) -> str:
    """A share on an axis or over a column."""
    return f"{100 * value:.3g} %"


def save(figure: Any, path: Path) -> Path:
    """The picture as a file, whole or not at all."""
    with whole(path, durable=True) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path
