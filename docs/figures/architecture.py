"""Draw the parts of the model: two encoders, the similarity of their features, the fusion encoder and its heads."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/architecture.svg`."""
    drawing = Drawing(7.8, 6.0)
    drawing.box(0.2, 0.2, 2.3, 0.55, "an image", "plain")
    drawing.box(5.3, 0.2, 2.3, 0.55, "“a cat on a sofa”", "plain")
    drawing.box(0.2, 1.2, 2.3, 0.95, "image encoder\nvision transformer", "image")
    drawing.box(5.3, 1.2, 2.3, 0.95, "text encoder\nlower layers of BERT", "text")
    drawing.box(3.0, 1.2, 1.8, 0.95, "similarity\ncosine / τ", "plain")
    drawing.box(3.0, 0.2, 1.8, 0.55, "CMA, IMC, LMI", "loss")
    drawing.arrow((1.35, 0.75), (1.35, 1.2))
    drawing.arrow((6.45, 0.75), (6.45, 1.2))
    drawing.arrow((2.5, 1.5), (3.0, 1.5))
    drawing.arrow((5.3, 1.5), (4.8, 1.5))
    drawing.arrow((3.9, 1.2), (3.9, 0.75))
    drawing.label(3.9, 2.42, "one feature of the image, one of the text")

    drawing.box(0.2, 3.3, 7.4, 0.85, "fusion encoder\nupper layers of BERT: each token reads all patches", "fusion")
    drawing.arrow((1.35, 2.15), (1.35, 3.3), text="states of\nall patches", at=(1.35, 2.68))
    drawing.arrow((6.45, 2.15), (6.45, 3.3), text="states of\nall tokens", at=(6.45, 2.68))

    drawing.box(0.6, 4.55, 2.9, 0.6, "matching head", "fusion")
    drawing.box(4.3, 4.55, 2.9, 0.6, "language-model head", "fusion")
    drawing.arrow((2.05, 4.15), (2.05, 4.55))
    drawing.arrow((5.75, 4.15), (5.75, 4.55))
    drawing.box(0.6, 5.35, 2.9, 0.5, "ITM: do they match?", "loss")
    drawing.box(4.3, 5.35, 2.9, 0.5, "MLM: which word is hidden?", "loss")
    drawing.arrow((2.05, 5.15), (2.05, 5.35))
    drawing.arrow((5.75, 5.15), (5.75, 5.35))
    drawing.save("architecture")


if __name__ == "__main__":
    draw()
