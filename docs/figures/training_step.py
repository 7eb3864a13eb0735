"""Draw one step of pre-training as a flow of data: student and teacher side by side, and five losses."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/training_step.svg`."""
    drawing = Drawing(5.2, 8.5)
    drawing.box(0.1, 7.9, 5.0, 0.5, "1. the teacher moves towards the student", "teacher")
    drawing.label(2.6, 7.62, "2. N pairs, two views of each image")

    drawing.box(0.1, 6.6, 2.4, 0.75, "student reads\nview a, text, masked text", "image")
    drawing.box(2.7, 6.6, 2.4, 0.75, "teacher reads\nview b, text, masked text", "teacher")
    drawing.box(0.1, 5.4, 2.4, 0.75, "features\nof images and texts", "image")
    drawing.box(2.7, 5.4, 2.4, 0.75, "features, also of parts\nwithout gradient", "teacher")
    drawing.arrow((1.3, 6.6), (1.3, 6.15))
    drawing.arrow((3.9, 6.6), (3.9, 6.15))

    drawing.box(0.1, 4.15, 0.95, 0.75, "CMA\nacross", "loss")
    drawing.box(1.15, 4.15, 0.95, 0.75, "IMC\nwithin", "loss")
    drawing.box(2.2, 4.15, 0.95, 0.75, "LMI\nparts", "loss")
    drawing.box(3.4, 4.15, 1.7, 0.75, "queue\nkeys of CMA, IMC")
    drawing.arrow((0.57, 5.4), (0.57, 4.9))
    drawing.arrow((1.4, 5.4), (1.4, 4.9))
    drawing.arrow((2.9, 5.4), (2.9, 4.9))
    drawing.arrow((4.0, 5.4), (4.0, 4.9))
    drawing.label(2.15, 5.15, "3. compare")
    drawing.label(4.5, 5.15, "4. push")

    drawing.box(0.1, 2.95, 3.25, 0.75, "5. draw hard negatives\nfor each image and each text")
    drawing.arrow((0.57, 4.15), (0.57, 3.7))
    fusion = "6. fusion encoder, 4 N rows\nN true pairs, 2 N wrong pairs,\nN masked texts"
    drawing.box(0.1, 1.5, 3.25, 1.0, fusion, "fusion")
    drawing.arrow((1.72, 2.95), (1.72, 2.5))
    drawing.box(3.6, 1.5, 1.5, 1.0, "teacher’s words\nsoften\nthe targets", "teacher")
    drawing.box(0.1, 0.75, 1.55, 0.45, "ITM: match or not", "loss")
    drawing.box(1.8, 0.75, 1.55, 0.45, "MLM: hidden word", "loss")
    drawing.arrow((0.87, 1.5), (0.87, 1.2))
    drawing.arrow((2.57, 1.5), (2.57, 1.2))
    drawing.arrow((4.35, 1.5), (4.35, 0.97), (3.35, 0.97))
    drawing.box(0.1, 0.1, 5.0, 0.45, "7. the weighted sum of the losses moves the student")
    drawing.save("training_step")


if __name__ == "__main__":
    draw()
