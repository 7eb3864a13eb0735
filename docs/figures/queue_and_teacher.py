"""Draw how the teacher follows the student, and how its features fill the queue that the student is compared with."""

from figure_style import Drawing


def draw() -> None:
    """Write `docs/images/queue_and_teacher.svg`."""
    drawing = Drawing(5.2, 4.7)
    drawing.box(0.1, 3.6, 1.6, 0.85, "student\nlearns by gradient", "image")
    drawing.box(0.1, 1.15, 1.6, 0.85, "teacher\nfollows slowly", "teacher")
    drawing.arrow((0.9, 3.6), (0.9, 2.0), text="each step:\n99.5 % of itself,\n0.5 % student", broken=True)
    drawing.box(2.4, 3.78, 0.9, 0.5, "query", "image")
    drawing.arrow((1.7, 4.03), (2.4, 4.03), text="view a", at=(2.03, 4.3))

    drawing.cells(2.3, 1.43, 0.28, [["loss", "teacher", "teacher", "teacher"]], gap=0.03)
    drawing.cells(3.7, 1.43, 0.28, [["plain"] * 4], gap=0.03)
    drawing.arrow((1.7, 1.57), (2.3, 1.57), text="view b", at=(2.0, 1.84))
    drawing.label(2.9, 1.17, "this batch")
    drawing.label(4.45, 1.17, "queue: earlier")
    drawing.arrow((2.9, 1.0), (2.9, 0.65), (3.68, 0.65), (3.68, 1.5))
    drawing.label(2.6, 0.35, "pushed after the comparison")
    drawing.arrow((4.77, 1.0), (4.77, 0.55))
    drawing.label(4.5, 0.35, "oldest leave")

    drawing.arrow((2.55, 3.78), (2.44, 1.74), color="#bf4f6f")
    for x in (2.75, 3.06, 3.84, 4.15, 4.77):
        drawing.arrow((3.0, 3.78), (x, 1.74), broken=True)
    drawing.label(2.1, 2.75, "pull", weight="bold")
    drawing.label(4.45, 3.0, "push away", weight="bold")
    drawing.save("queue_and_teacher")


if __name__ == "__main__":
    draw()
