"""Draw the question that each of the five objectives asks."""

from figure_style import Drawing


def cross_modal_alignment() -> None:
    """Write `docs/images/cma.svg`: the similarities of images with the texts of the batch and of the queue."""
    drawing = Drawing(7.8, 3.0)
    rows = [["loss" if row == column else "faint" for column in range(4)] + ["", *["plain"] * 7] for row in range(4)]
    rows[1][2] = rows[1][8] = "teacher"
    drawing.cells(2.05, 1.95, 0.4, rows)
    for row in range(4):
        drawing.box(0.65, 1.98 - row * 0.44, 1.2, 0.34, f"image {row + 1}", "image", size=10)
    drawing.label(2.91, 2.65, "texts of the batch")
    drawing.label(5.75, 2.65, "texts in the queue")
    drawing.box(0.65, 0.1, 1.7, 0.36, "its own text", "loss", size=10)
    drawing.box(2.55, 0.1, 4.52, 0.36, "the teacher finds it similar too: a soft target", "teacher", size=10)
    drawing.save("cma")


def intra_modal_contrast() -> None:
    """Write `docs/images/imc.svg`: two views of a sample attract each other, and other samples keep away."""
    drawing = Drawing(7.8, 2.6)
    drawing.box(0.2, 1.75, 2.2, 0.65, "image, view a\nstudent", "image")
    drawing.box(5.4, 1.75, 2.2, 0.65, "image, view b\nteacher", "teacher")
    drawing.arrow((2.4, 2.07), (5.4, 2.07), text="the same image: pull", color="#bf4f6f")
    drawing.box(0.2, 0.2, 2.2, 0.65, "text, dropout a\nstudent", "text")
    drawing.box(5.4, 0.2, 2.2, 0.65, "text, dropout b\nteacher", "teacher")
    drawing.arrow((2.4, 0.52), (5.4, 0.52), text="the same text: pull", color="#bf4f6f")
    drawing.label(
        3.9, 1.3, "images are compared with images, and texts with texts;\nother samples and the queue are pushed away"
    )
    drawing.save("imc")


def local_mutual_information() -> None:
    """Write `docs/images/lmi.svg`: a whole image and its own regions, against the regions of other images."""
    drawing = Drawing(7.8, 2.9)
    drawing.box(0.2, 1.0, 1.9, 0.85, "whole image\nstudent", "image")
    drawing.cells(3.2, 1.95, 0.38, [["teacher"] * 4] * 4, gap=0.03)
    drawing.cells(5.9, 1.95, 0.38, [["faint"] * 4] * 4, gap=0.03)
    drawing.label(4.0, 2.62, "regions of the same image")
    drawing.label(6.7, 2.62, "regions of others")
    drawing.arrow((2.1, 1.55), (3.2, 1.55), text="pull", at=(2.62, 1.82), color="#bf4f6f")
    drawing.arrow(
        (2.1, 1.2), (2.6, 1.2), (2.6, 0.4), (6.7, 0.4), (6.7, 0.72), text="push away", at=(4.6, 0.4), broken=True
    )
    drawing.save("lmi")


def image_text_matching() -> None:
    """Write `docs/images/itm.svg`: a true pair and two wrong pairs that look alike."""
    drawing = Drawing(7.8, 3.0)
    pairs = (
        ("a cat on a sofa", "image of the cat", "matches"),
        ("a cat on a sofa", "a similar image: a dog", "does not match"),
        ("a cat on a chair", "image of the cat", "does not match"),
    )
    for number, (text, image, verdict) in enumerate(pairs):
        y = 2.1 - number * 0.95
        negative = number > 0
        drawing.box(0.2, y, 2.1, 0.6, text, "loss" if number == 2 else "text", size=10)
        drawing.box(2.5, y, 2.3, 0.6, image, "loss" if number == 1 else "image", size=10)
        drawing.arrow((4.8, y + 0.3), (5.6, y + 0.3))
        drawing.box(5.6, y, 2.0, 0.6, verdict, "plain" if negative else "fusion", size=10)
    drawing.label(5.2, 1.72, "fusion")
    drawing.save("itm")


def masked_language_modelling() -> None:
    """Write `docs/images/mlm.svg`: a hidden word is predicted from text and image; the teacher softens it."""
    drawing = Drawing(7.8, 3.0)
    drawing.box(0.2, 2.1, 2.5, 0.6, "“a [MASK] on a sofa”", "text", size=10)
    drawing.box(0.2, 1.2, 2.5, 0.6, "image of the cat", "image", size=10)
    drawing.box(3.2, 1.2, 1.4, 1.5, "fusion\nencoder", "fusion")
    drawing.arrow((2.7, 2.4), (3.2, 2.4))
    drawing.arrow((2.7, 1.5), (3.2, 1.5))
    drawing.arrow((4.6, 1.95), (5.1, 1.95))
    words = (("cat", 0.75), ("kitten", 0.18), ("dog", 0.07))
    for number, (word, share) in enumerate(words):
        y = 2.25 - number * 0.5
        drawing.box(5.1, y, 0.9, 0.38, word, "plain", size=10)
        drawing.box(6.1, y + 0.02, 0.08 + 1.4 * share, 0.34, "", "teacher")
    drawing.label(6.05, 0.85, "target: the word, and the teacher’s guesses")
    drawing.label(2.3, 0.4, "15 % of the tokens are hidden; the image helps to guess them")
    drawing.save("mlm")


def draw() -> None:
    """Write the figures of all objectives."""
    cross_modal_alignment()
    intra_modal_contrast()
    local_mutual_information()
    image_text_matching()
    masked_language_modelling()


if __name__ == "__main__":
    draw()
