"""Draw the parts of the model: two encoders, the similarity of their features, the fusion encoder and its heads."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/architecture.svg`."""
    drawing = Drawing(5.2, 6.3)
    drawing.box(0.1, 0.1, 1.65, 0.5, "an image")
    drawing.box(3.45, 0.1, 1.65, 0.5, "“a cat on a sofa”")
    drawing.box(0.1, 1.05, 1.65, 0.95, "image encoder\nvision transformer", "image")
    drawing.box(3.45, 1.05, 1.65, 0.95, "text encoder\nlower layers\nof BERT", "text")
    drawing.box(2.05, 1.05, 1.1, 0.95, "similarity\ncosine / τ")
    drawing.box(1.95, 0.1, 1.3, 0.5, "CMA, IMC, LMI", "loss")
    drawing.arrow((0.92, 0.6), (0.92, 1.05))
    drawing.arrow((4.28, 0.6), (4.28, 1.05))
    drawing.arrow((1.75, 1.52), (2.05, 1.52))
    drawing.arrow((3.45, 1.52), (3.15, 1.52))
    drawing.arrow((2.6, 1.05), (2.6, 0.6))
    drawing.label(2.6, 2.3, "one feature\nof each")

    drawing.box(0.1, 3.15, 5.0, 1.0, "fusion encoder\nupper layers of BERT:\neach token reads all patches", "fusion")
    drawing.arrow((0.92, 2.0), (0.92, 3.15), text="states of\nall patches")
    drawing.arrow((4.28, 2.0), (4.28, 3.15), text="states of\nall tokens")

    drawing.box(0.1, 4.6, 2.4, 0.55, "matching head", "fusion")
    drawing.box(2.7, 4.6, 2.4, 0.55, "language-model head", "fusion")
    drawing.arrow((1.3, 4.15), (1.3, 4.6))
    drawing.arrow((3.9, 4.15), (3.9, 4.6))
    drawing.box(0.1, 5.55, 2.4, 0.5, "ITM: do they match?", "loss")
    drawing.box(2.7, 5.55, 2.4, 0.5, "MLM: which word is hidden?", "loss")
    drawing.arrow((1.3, 5.15), (1.3, 5.55))
    drawing.arrow((3.9, 5.15), (3.9, 5.55))
    drawing.save("architecture")


if __name__ == "__main__":
    draw()
