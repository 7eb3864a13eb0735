"""Draw how a text finds images: similarity picks candidates among all, and matching puts them in a new order."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/re_ranking.svg`."""
    drawing = Drawing(7.8, 5.0)
    drawing.box(0.2, 4.2, 2.1, 0.6, "“a cat on a sofa”", "text")
    drawing.label(5.1, 4.66, "1. similarity orders all images: one product of features for each")
    drawing.cells(2.75, 4.05, 0.36, [["image"] * 4 + ["faint"] * 8])
    for number in range(4):
        drawing.write(2.93 + number * 0.4, 4.22, "ABCD"[number])
    drawing.frame(2.68, 3.97, 1.66, 0.52, "fusion")
    drawing.arrow((3.5, 3.97), (3.5, 3.3), text="2. the k best are candidates", at=(3.5, 3.66))

    drawing.box(
        0.2,
        2.35,
        7.4,
        0.95,
        "3. fusion encoder and matching head\neach candidate is read together with the text",
        "fusion",
    )
    drawing.arrow((1.25, 4.2), (1.25, 3.3))
    rows = (("A", "0.4"), ("B", "3.1"), ("C", "-2.0"), ("D", "1.2"))
    for number, (name, logit) in enumerate(rows):
        x = 0.55 + number * 1.75
        drawing.arrow((x + 0.7, 2.35), (x + 0.7, 1.95))
        drawing.box(x, 1.45, 1.4, 0.5, f"{name}: {logit}", "plain")
    drawing.label(3.9, 1.2, "4. the matching scores order the candidates anew")
    for number, name in enumerate("BDAC"):
        drawing.cells(1.75 + number * 0.46, 0.42, 0.4, [["image"]])
        drawing.write(1.95 + number * 0.46, 0.6, name)
    drawing.cells(3.75, 0.44, 0.36, [["faint"] * 6])
    drawing.label(5.0, 0.2, "all others stay behind")
    drawing.label(2.65, 0.2, "result")
    drawing.save("re_ranking")


if __name__ == "__main__":
    draw()
