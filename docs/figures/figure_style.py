"""The style that all figures share: boxes, arrows and tables that are legible on a white page and on a dark one.

The background is transparent. Texts are dark and stand on light boxes, and lines have a grey that both pages show.
Coordinates are in inches, from the lower left corner. `save` writes the same bytes each time.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

IMAGES = Path(__file__).parents[1] / "images"

INK = "#16191d"
LINE = "#858b94"  # 3.4 : 1 on white, and about 5 : 1 on a dark page
# Fill and edge by what a box holds.
COLORS = {
    "image": ("#a9cdf8", "#3f7fc4"),
    "text": ("#f9d992", "#b58316"),
    "fusion": ("#bce5b5", "#4b9a41"),
    "loss": ("#f5bccb", "#bf4f6f"),
    "teacher": ("#dccbf2", "#8159b8"),
    "plain": ("#e6e9ed", "#858b94"),
    "faint": ("#f4f5f7", "#b4bac2"),
}
SIZE = 11  # points


class Drawing:
    """A figure of boxes and arrows.

    Args:
        width, height: its size in inches.
    """

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", kind: str = "plain", size: float = SIZE
    ) -> None:
        """Draw a box with a text in its middle; the first line of several is bold."""
        fill, edge = COLORS[kind]
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=fill, ec=edge, lw=1.3
        )
        self.axes.add_patch(shape)
        lines = text.split("\n")
        step = size * 1.3 / 72  # inches from line to line
        top = y + height / 2 + step * (len(lines) - 1) / 2
        for number, line in enumerate(lines):
            weight = "bold" if number == 0 and len(lines) > 1 else "normal"
            self.write(x + width / 2, top - number * step, line, size, weight)

    def frame(self, x: float, y: float, width: float, height: float, kind: str = "plain") -> None:
        """Draw an empty frame with broken lines around what belongs together."""
        edge = COLORS[kind][1]
        self.axes.add_patch(Rectangle((x, y), width, height, fc="none", ec=edge, lw=1.3, ls=(0, (4, 3))))

    def write(self, x: float, y: float, text: str, size: float = SIZE, weight: str = "normal") -> None:
        """Write a text on a box."""
        self.axes.text(x, y, text, ha="center", va="center_baseline", fontsize=size, color=INK, fontweight=weight)

    def label(self, x: float, y: float, text: str, size: float = SIZE - 1.5, weight: str = "normal") -> None:
        """Write a text on a light ground of its own, for places outside of boxes."""
        ground = {"boxstyle": "round,pad=0.25,rounding_size=0.2", "fc": "#eef0f3", "ec": "none"}
        self.axes.text(
            *(x, y, text),
            ha="center",
            va="center",
            fontsize=size,
            color=INK,
            bbox=ground,
            fontweight=weight,
            linespacing=1.3,
        )

    def arrow(
        self,
        *points: tuple[float, float],
        text: str = "",
        at: tuple[float, float] | None = None,
        broken: bool = False,
        color: str = LINE,
    ) -> None:
        """Draw an arrow along points. Its label stands in the middle of the first and the last one, or `at` a place."""
        style = (0, (4, 2.5)) if broken else "-"
        for start, end in pairwise(points[:-1]):  # the last piece has the head
            self.axes.plot(*zip(start, end, strict=True), color=color, lw=1.6, ls=style, solid_capstyle="round")
        head = FancyArrowPatch(
            *(points[-2], points[-1]),
            arrowstyle="-|>",
            mutation_scale=13,
            color=color,
            lw=1.6,
            ls=style,
            shrinkA=0,
            shrinkB=1,
        )
        self.axes.add_patch(head)
        if text:
            (x1, y1), (x2, y2) = points[0], points[-1]
            self.label(*(at or ((x1 + x2) / 2, (y1 + y2) / 2)), text)

    def cells(self, x: float, y: float, side: float, kinds: Sequence[Sequence[str]], gap: float = 0.04) -> None:
        """Draw rows of square cells, the first row on top; an empty kind leaves a place free."""
        for row, names in enumerate(kinds):
            for column, kind in enumerate(names):
                if kind:
                    fill, edge = COLORS[kind]
                    place = (x + column * (side + gap), y - row * (side + gap))
                    self.axes.add_patch(Rectangle(place, side, side, fc=fill, ec=edge, lw=1))

    def save(self, name: str) -> None:
        """Write `docs/images/NAME.svg`."""
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            self.figure.savefig(IMAGES / f"{name}.svg", transparent=True, metadata={"Date": None})
