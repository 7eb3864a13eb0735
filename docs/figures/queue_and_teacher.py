"""Draw how the teacher follows the student, and how its features fill the queue that the student is compared with."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/queue_and_teacher.svg`."""
    drawing = Drawing(7.8, 4.6)
    drawing.box(0.2, 3.3, 2.2, 0.85, "student\nlearns by gradient", "image")
    drawing.box(0.2, 1.0, 2.2, 0.85, "teacher\nfollows slowly", "teacher")
    drawing.arrow((1.3, 3.3), (1.3, 1.85), text="each step: 99.5 % of itself\n+ 0.5 % of the student", broken=True)
    drawing.box(3.3, 3.45, 1.2, 0.55, "query", "image")
    drawing.arrow((2.4, 3.72), (3.3, 3.72), text="view a", at=(2.82, 3.98))

    drawing.cells(3.3, 1.25, 0.34, [["loss", "teacher", "teacher", "teacher"]])
    drawing.cells(5.1, 1.25, 0.34, [["plain"] * 6])
    drawing.label(4.05, 1.0, "keys of this batch")
    drawing.label(6.5, 1.0, "queue: keys of earlier batches")
    drawing.arrow((2.4, 1.42), (3.3, 1.42), text="view b", at=(2.82, 1.68))
    drawing.arrow((4.05, 0.85), (4.05, 0.55), (5.2, 0.55), (5.2, 1.25))
    drawing.label(4.1, 0.28, "pushed after the comparison")
    drawing.arrow((7.17, 0.85), (7.17, 0.45))
    drawing.label(6.75, 0.28, "the oldest leave")

    drawing.arrow((3.6, 3.45), (3.47, 1.62), color="#bf4f6f")
    for x in (4.22, 5.27, 6.03, 7.17):
        drawing.arrow((4.1, 3.45), (x, 1.62), broken=True)
    drawing.label(2.98, 2.62, "pull", weight="bold")
    drawing.label(6.0, 3.0, "push away", weight="bold")
    drawing.save("queue_and_teacher")


if __name__ == "__main__":
    draw()
