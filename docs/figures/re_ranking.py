"""Draw how a text finds images: similarity picks candidates among all, and matching puts them in a new order."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/re_ranking.svg`."""
    drawing = Drawing(5.2, 6.2)
    drawing.box(0.1, 5.6, 5.0, 0.5, "“a cat on a sofa”", "text")
    drawing.label(2.6, 5.3, "1. the similarity orders all images")
    drawing.cells(0.45, 4.68, 0.36, [["image"] * 4 + ["faint"] * 7])
    for number in range(4):
        drawing.write(0.63 + number * 0.4, 4.85, "ABCD"[number])
    drawing.frame(0.37, 4.6, 1.68, 0.52, "fusion")
    drawing.arrow((1.2, 4.6), (1.2, 3.75), text="2. the k best are\ncandidates", at=(1.2, 4.2))

    text = "3. fusion encoder and matching head\neach candidate is read\ntogether with the text"
    drawing.box(0.1, 2.7, 5.0, 1.05, text, "fusion")
    for number, (name, logit) in enumerate((("A", "0.4"), ("B", "3.1"), ("C", "-2.0"), ("D", "1.2"))):
        x = 0.2 + number * 1.25
        drawing.arrow((x + 0.52, 2.7), (x + 0.52, 2.3))
        drawing.box(x, 1.85, 1.05, 0.45, f"{name}: {logit}")
    drawing.label(2.6, 1.5, "4. matching orders the candidates anew")
    drawing.cells(0.45, 0.8, 0.36, [["image"] * 4 + [""] + ["faint"] * 6])
    for number, name in enumerate("BDAC"):
        drawing.write(0.63 + number * 0.4, 0.97, name)
    drawing.label(1.2, 0.45, "result")
    drawing.label(3.6, 0.45, "all others stay behind")
    drawing.save("re_ranking")


if __name__ == "__main__":
    draw()
