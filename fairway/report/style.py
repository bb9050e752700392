"""The look of the figures: one palette, two shapes, and SVG that takes its colours from the
page.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

# name → (light, dark). A figure is drawn in the light colours; in the page's SVG each becomes the
# CSS variable of its name. Lines differ for every common kind of colour blindness, and have a
# contrast of 4.5:1 to the background.
COLOURS = {
    "surface": ("#fefefe", "#16191d"),
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#59636e", "#a3acb6"),
    "grid": ("#d9dee4", "#363c44"),
    "warn": ("#b42318", "#ff8a7a"),
    "apart": ("#f3dcd8", "#452823"),
    "c0": ("#0a5ea8", "#62b1ff"),
    "c1": ("#b84a00", "#ff9d57"),
    "c2": ("#00765c", "#3fd0a4"),
    "c3": ("#9a3b8c", "#eb9bdf"),
    "c4": ("#756000", "#dcc24a"),
    "c5": ("#a8243c", "#ff8fa3"),
    "c6": ("#3f6212", "#a3d65c"),
    "c7": ("#4b4f57", "#c3c8cf"),
    "f0": ("#bcd9f5", "#1d4468"),
    "f1": ("#f8d3b5", "#6b3a17"),
    "f2": ("#b5e4d6", "#14503f"),
    "f3": ("#ecc9e6", "#5d2f56"),
    "f4": ("#ece0a6", "#574b14"),
    "f5": ("#dbdee2", "#42474f"),
    "f6": ("#f6cdd4", "#63252f"),
    "f7": ("#d3e6b8", "#3b4f1d"),
}
LINES = ("-", (0, (5, 1.8)), (0, (1.2, 1.4)), (0, (7, 2, 1.5, 2)))
MARKS = "osD^vPX*"


def light(name: str) -> str:
    return COLOURS[name][0]


class FigureShape(NamedTuple):
    """The width of a figure. 72 points per inch make a point one CSS pixel at its intended
    width.
    """

    name: str
    width: float  # inches

    @property
    def wide(self) -> bool:
        return self.width > 8


WIDE, NARROW = FigureShape("wide", 12.0), FigureShape("narrow", 4.8)
PNG_DPI = 100
# DejaVu Sans comes with matplotlib, and most fonts of readers are narrower.
FONT, FONT_SIZE = (
    "DejaVu Sans",
    14,
)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib up for these figures, and restore it afterwards."""
    import matplotlib

    settings = {
        **dict.fromkeys(
            (
                "font.size",
                "axes.labelsize",
                "axes.titlesize",
                "xtick.labelsize",
                "ytick.labelsize",
                "legend.fontsize",
            ),
            FONT_SIZE,
        ),
        "legend.frameon": False,
        "font.family": FONT,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fairway",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": light("ink"),
        "axes.labelcolor": light("ink"),
        "xtick.color": light("soft"),
        "ytick.color": light("soft"),
        "xtick.labelcolor": light("ink"),
        "ytick.labelcolor": light("ink"),
        "axes.edgecolor": light("soft"),
        "grid.color": light("grid"),
        "grid.linewidth": 1.0,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.2,
        "hatch.linewidth": 1.2,
        "axes.titlelocation": "left",
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The font of a PNG may lack a glyph.
        warnings.filterwarnings("ignore", module="matplotlib")
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(
    shape: FigureShape, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    """Return a figure of that height in inches, and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(shape.width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def settle(figure: Any) -> None:
    """Lay the axes out once, at rounded places: the solver's last bits differ between processes."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(
            [round(float(place), 5) for place in axes.get_position(original=True).bounds]
        )


def svg(figure: Any, prefix: str) -> str:
    """Return the inside of an <svg> element from its viewBox on, with page colours and prefixed
    ids.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(out, metadata=metadata)  # savefig would draw twice
    text = out.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)[1]
    text = text[text.index(">") + 1 : text.rindex("</svg>")]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(
        r'\b(id=")|(url\(#)|xlink:(href="#)', lambda m: (m[1] or m[2] or m[3]) + prefix, text
    )
    # Only inside tags: never the text.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{2,}", one_place, tag[0]), text)
    text = re.sub(r"'DejaVu Sans'(, [\w' -]+)*", "inherit", text)
    for name, (colour, _) in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"\s*\n\s*", "\n", text)
    return f'viewBox="{box}">{text}'


def one_place(digits: re.Match) -> str:
    return f"{float(digits[0]):.1f}".removesuffix(".0")


def png(figure: Any) -> bytes:
    """Return a settled figure as a PNG file, on the page's light background."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out, dpi = io.BytesIO(), figure.dpi
    figure.set(dpi=PNG_DPI, facecolor=light("surface"))
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    figure.set(dpi=dpi, facecolor="none")
    return out.getvalue()


def variables(dark: bool) -> str:
    return "".join(f"--{name}:{pair[dark]};" for name, pair in COLOURS.items())


def text_width(text: str) -> float:
    """Return the width of a text in points, at the size of the figures."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(
        text, FontProperties(family=FONT, size=FONT_SIZE), False
    )[0]


def wrapped(text: str, width: float) -> str:
    """Break text at spaces into lines of at most `width` points, if words allow it."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip(" ")
        if lines[-1] and text_width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def label(name: str) -> str:
    """Return a legend label. matplotlib hides labels that begin with an underscore."""
    return f"\u2009{name}" if name.startswith("_") else name


def short(value: float, _: object = None) -> str:
    """`short(1_300_000)` is "1.3M": a number for an axis."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
