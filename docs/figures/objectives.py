"""Draw the question that each of the five objectives asks."""

from figure_style import Drawing

PULL = "#bf4f6f"


def cross_modal_alignment() -> None:
    """Write `docs/images/cma.svg`: the similarities of images with the texts of the batch and of the queue."""
    drawing = Drawing(5.2, 3.0)
    rows = [["loss" if row == column else "faint" for column in range(4)] + ["", *["plain"] * 5] for row in range(4)]
    rows[1][2] = rows[1][7] = "teacher"
    drawing.cells(1.25, 1.95, 0.35, rows)
    for row in range(4):
        drawing.box(0.1, 1.96 - row * 0.39, 1.0, 0.33, f"image {row + 1}", "image", size=10)
    drawing.label(2.0, 2.65, "texts of the batch")
    drawing.label(4.15, 2.65, "texts in the queue")
    drawing.box(0.1, 0.1, 1.4, 0.36, "its own text", "loss", size=10)
    drawing.box(1.7, 0.1, 3.4, 0.36, "similar for the teacher: soft target", "teacher", size=10)
    drawing.save("cma")


def intra_modal_contrast() -> None:
    """Write `docs/images/imc.svg`: two views of a sample attract each other, and other samples keep away."""
    drawing = Drawing(5.2, 2.9)
    drawing.box(0.1, 2.1, 1.6, 0.7, "image, view a\nstudent", "image")
    drawing.box(3.5, 2.1, 1.6, 0.7, "image, view b\nteacher", "teacher")
    drawing.arrow((1.7, 2.45), (3.5, 2.45), text="same image: pull", color=PULL)
    drawing.box(0.1, 0.1, 1.6, 0.7, "text, dropout a\nstudent", "text")
    drawing.box(3.5, 0.1, 1.6, 0.7, "text, dropout b\nteacher", "teacher")
    drawing.arrow((1.7, 0.45), (3.5, 0.45), text="same text: pull", color=PULL)
    drawing.label(2.6, 1.45, "images with images, and texts with texts;\nall others and the queue are pushed away")
    drawing.save("imc")


def local_mutual_information() -> None:
    """Write `docs/images/lmi.svg`: a whole image and its own regions, against the regions of other images."""
    drawing = Drawing(5.2, 2.6)
    drawing.box(0.1, 0.95, 1.25, 0.8, "whole image\nstudent", "image")
    drawing.cells(2.1, 1.75, 0.28, [["teacher"] * 4] * 4, gap=0.03)
    drawing.cells(3.8, 1.75, 0.28, [["faint"] * 4] * 4, gap=0.03)
    drawing.label(2.7, 2.35, "own regions")
    drawing.label(4.4, 2.35, "regions of others")
    drawing.arrow((1.35, 1.5), (2.1, 1.5), text="pull", at=(1.7, 1.78), color=PULL)
    drawing.arrow(
        (1.35, 1.15), (1.7, 1.15), (1.7, 0.4), (4.4, 0.4), (4.4, 0.8), text="push away", at=(3.0, 0.4), broken=True
    )
    drawing.save("lmi")


def image_text_matching() -> None:
    """Write `docs/images/itm.svg`: a true pair and two wrong pairs that look alike."""
    drawing = Drawing(5.2, 3.0)
    pairs = (
        ("a cat on a sofa", "the cat", "matches"),
        ("a cat on a sofa", "a similar image", "does not match"),
        ("a cat on a chair", "the cat", "does not match"),
    )
    drawing.label(0.8, 2.78, "text")
    drawing.label(2.35, 2.78, "image")
    drawing.label(3.4, 2.78, "fusion")
    for number, (text, image, verdict) in enumerate(pairs):
        y = 1.9 - number * 0.9
        drawing.box(0.1, y, 1.4, 0.6, text, "loss" if number == 2 else "text", size=10)
        drawing.box(1.65, y, 1.4, 0.6, image, "loss" if number == 1 else "image", size=10)
        drawing.arrow((3.05, y + 0.3), (3.75, y + 0.3))
        drawing.box(3.75, y, 1.35, 0.6, verdict, "plain" if number else "fusion", size=10)
    drawing.save("itm")


def masked_language_modelling() -> None:
    """Write `docs/images/mlm.svg`: a hidden word is predicted from text and image; the teacher softens it."""
    drawing = Drawing(5.2, 3.1)
    drawing.box(0.1, 2.3, 1.75, 0.6, "a [MASK] on a sofa", "text", size=10)
    drawing.box(0.1, 1.4, 1.75, 0.6, "image of the cat", "image", size=10)
    drawing.box(2.15, 1.4, 0.95, 1.5, "fusion\nencoder", "fusion")
    drawing.arrow((1.85, 2.6), (2.15, 2.6))
    drawing.arrow((1.85, 1.7), (2.15, 1.7))
    drawing.arrow((3.1, 2.15), (3.4, 2.15))
    for number, (word, share) in enumerate((("cat", 0.75), ("kitten", 0.18), ("dog", 0.07))):
        y = 2.46 - number * 0.5
        drawing.box(3.4, y, 0.7, 0.38, word, size=10)
        drawing.box(4.15, y + 0.02, 0.08 + 1.1 * share, 0.34, "", "teacher")
    drawing.label(2.6, 0.92, "target: the hidden word and the teacher’s guesses")
    drawing.label(2.6, 0.4, "15 % of the tokens are hidden,\nand the image helps to guess them")
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
