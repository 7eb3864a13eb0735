"""Draw one step of pre-training as a flow of data: student and teacher side by side, and five losses."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/training_step.svg`."""
    drawing = Drawing(7.8, 8.2)
    drawing.box(1.5, 7.5, 4.8, 0.55, "1. the teacher moves towards the student", "teacher")

    drawing.box(0.2, 6.35, 3.5, 0.75, "student reads\nview a, text, masked text", "image")
    drawing.box(4.1, 6.35, 3.5, 0.75, "teacher reads\nview b, text, masked text", "teacher")
    drawing.label(3.9, 7.27, "2. a batch of N pairs, two views of each image")
    drawing.box(0.2, 5.3, 3.5, 0.7, "features\nof images and texts", "image")
    drawing.box(4.1, 5.3, 3.5, 0.7, "features, and those of parts\nwithout gradient", "teacher")
    drawing.arrow((1.95, 6.35), (1.95, 6.0))
    drawing.arrow((5.85, 6.35), (5.85, 6.0))

    drawing.box(5.7, 4.15, 1.9, 0.75, "queue\nkeys of CMA, IMC", "plain")
    drawing.box(0.2, 4.15, 1.6, 0.75, "CMA\nacross", "loss")
    drawing.box(1.95, 4.15, 1.6, 0.75, "IMC\nwithin", "loss")
    drawing.box(3.7, 4.15, 1.6, 0.75, "LMI\nparts", "loss")
    drawing.arrow((1.0, 5.3), (1.0, 4.9))
    drawing.arrow((2.75, 5.3), (2.75, 4.9))
    drawing.arrow((4.5, 5.3), (4.5, 4.9))
    drawing.arrow((6.65, 5.3), (6.65, 4.9), text="4. push", at=(7.2, 5.1))
    drawing.label(3.63, 5.12, "3. both are compared")

    drawing.box(0.2, 2.95, 3.5, 0.75, "5. draw hard negatives\nfor each image and each text", "plain")
    drawing.arrow((1.0, 4.15), (1.0, 3.7))
    drawing.box(
        *(0.2, 1.7, 5.1, 0.85),
        "6. fusion encoder, 4 N rows\ntrue pairs, 2 N wrong pairs, N masked texts",
        "fusion",
    )
    drawing.arrow((1.95, 2.95), (1.95, 2.55))
    drawing.box(0.2, 0.75, 2.4, 0.55, "ITM: match or not", "loss")
    drawing.box(2.9, 0.75, 2.4, 0.55, "MLM: hidden words", "loss")
    drawing.arrow((1.4, 1.7), (1.4, 1.3))
    drawing.arrow((4.1, 1.7), (4.1, 1.3))
    drawing.box(5.7, 1.7, 1.9, 0.85, "teacher’s words\nsoften the targets", "teacher", size=10)
    drawing.arrow((6.65, 1.7), (6.65, 1.02), (5.3, 1.02))
    drawing.box(0.2, 0.1, 7.4, 0.45, "7. the weighted sum of the losses moves the student, not the teacher", "plain")
    drawing.save("training_step")


if __name__ == "__main__":
    draw()
