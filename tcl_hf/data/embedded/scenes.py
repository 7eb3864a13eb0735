"""Small embedded data for the tasks: scenes composed of OpenMoji pictures, with statements whose truth follows.

A scene is white, and shows 2 to 4 different objects, out of 12 pictures that pre-training saw. For statements they
stand in a 2 x 2 grid. One of the cells may hold a closed card, which hides one more object, different from those that
show: what it hides nobody can tell, and this alone makes a statement *neutral*. For grounding, the objects have random
sizes and lie anywhere without overlap.

Some pairs of objects are held out, 12 of 66: the objects are put on a circle in a random order of fixed seed, and each
is held out with its neighbours. No training scene shows both objects of such a pair, and every validation scene does.

In each template the labels are equally frequent, so that the statement alone says nothing, and half of the pictures of
entailed statements have a card. Statements begin with the object, as the names that pre-training read: from there a
small model learns them in minutes, from "there is a ..." it does not.
"""

import functools
import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from datasets import Dataset
from PIL import Image, ImageDraw

from ..annotations.entailment import ENTAILMENT_FEATURES
from ..annotations.phrases import PHRASE_FEATURES
from ..annotations.reasoning import REASONING_FEATURES
from .openmoji import load_openmoji

OBJECTS = (
    *("banana", "bicycle", "bus", "cactus", "camera", "frog"),
    *("guitar", "house", "lion", "mushroom", "penguin", "pizza"),
)
SIDE = 64  # pixels of a scene
CELL = SIDE // 2
SEED = 0
NUM_SCENES = {"train": 20_000, "validation": 1_800}
NUM_PAIRS = {"train": 5_000, "validation": 225}  # of scenes, with 8 statements each

_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Scene:
    """What lies in the cells 0 to 3 (row by row): an object's number, `CARD`, or None."""

    cells: tuple[int | None, ...]

    @property
    def objects(self) -> set[int]:
        """The objects that show."""
        return {cell for cell in self.cells if cell is not None and cell != CARD}

    def row_of(self, item: int) -> int:
        """0 if it lies in the upper row, 1 if in the lower one."""
        return self.cells.index(item) // 2


CARD = -1
LABELS = ("contradiction", "neutral", "entailment")


@functools.cache
def _pictures() -> list[Image.Image]:
    """The objects' pictures."""
    rows = load_openmoji("train", size=CELL)
    pictures = {row["captions"][0]: row["image"]["bytes"] for row in rows}
    return [Image.open(io.BytesIO(pictures[name])).convert("RGB") for name in OBJECTS]


class _Composer:
    """Draws objects, arrangements and pictures of one split."""

    def __init__(self, split: str):
        if split not in _SPLITS:
            raise ValueError(f"scenes have no split '{split}': choose one of {', '.join(_SPLITS)}.")
        self.split = split
        self.random = random.Random(f"{SEED}-{split}")
        circle = list(range(len(OBJECTS)))
        random.Random(SEED).shuffle(circle)
        self.held_out = {frozenset(pair) for pair in zip(circle, [*circle[1:], circle[0]], strict=True)}
        self.pictures = _pictures()

    def objects(self, number: int, *, including: Iterable[int] = (), excluding: Iterable[int] = ()) -> set[int]:
        """Draw so many objects, in a combination that the split may show."""
        including = set(including)
        others = [item for item in range(len(OBJECTS)) if item not in including.union(excluding)]
        while True:
            drawn = including.union(self.random.sample(others, number - len(including)))
            pairs = (frozenset(pair) for pair in itertools.combinations(drawn, 2))
            if any(pair in self.held_out for pair in pairs) == (self.split == "validation"):
                return drawn

    def arrange(self, objects: set[int], card: bool) -> Scene:
        """Lay objects, and perhaps a card, into cells."""
        cells: list[int | None] = [*sorted(objects), *([CARD] if card else [])]
        cells += [None] * (4 - len(cells))
        self.random.shuffle(cells)
        return Scene(tuple(cells))

    def draw(self, scene: Scene) -> Image.Image:
        """The scene's picture."""
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        for number, cell in enumerate(scene.cells):
            left, top = number % 2 * CELL, number // 2 * CELL
            if cell == CARD:
                box = (left + 3, top + 3, left + CELL - 4, top + CELL - 4)
                ImageDraw.Draw(picture).rectangle(box, fill=(90, 90, 90), outline=(30, 30, 30), width=2)
            elif cell is not None:
                picture.paste(self.pictures[cell], (left, top))
        return picture


Statement = tuple[str, Scene]


def _there_is(composer: _Composer, label: str, number: int, card: bool) -> Statement:
    """ "X is there": shown; not shown and no card; not shown, but there is a card."""
    item = composer.random.randrange(len(OBJECTS))
    shown = {"including": {item}} if label == "entailment" else {"excluding": {item}}
    objects = composer.objects(number, **shown)
    hidden = {"entailment": card, "contradiction": False, "neutral": True}[label]
    return f"{OBJECTS[item]} is there", composer.arrange(objects, hidden)


def _there_are_both(composer: _Composer, label: str, number: int, card: bool) -> Statement:
    """ "X and Y are there": both shown; one or both not and no card; one not, but there is a card."""
    first, second = composer.random.sample(range(len(OBJECTS)), 2)
    while (frozenset((first, second)) in composer.held_out) != (composer.split == "validation"):
        first, second = composer.random.sample(range(len(OBJECTS)), 2)
    shown = {"including": {first}, "excluding": {second}}
    if label == "entailment":
        shown = {"including": {first, second}}
    elif label == "contradiction" and composer.random.random() < 0.5:
        shown = {"excluding": {first, second}}
    hidden = {"entailment": card, "contradiction": False, "neutral": True}[label]
    names = [OBJECTS[first], OBJECTS[second]]
    composer.random.shuffle(names)
    return f"{names[0]} and {names[1]} are there", composer.arrange(composer.objects(number, **shown), hidden)


def _in_row(composer: _Composer, label: str, number: int, card: bool) -> Statement:
    """ "X is in the top row": it lies there; in the other row, or nowhere and no card in this row; it does not
    show, and a card lies in this row."""
    item, row = composer.random.randrange(len(OBJECTS)), composer.random.randrange(2)
    elsewhere = label == "contradiction" and composer.random.random() < 0.5
    shown = {"including": {item}} if label == "entailment" or elsewhere else {"excluding": {item}}
    objects = composer.objects(number, **shown)
    while True:
        scene = composer.arrange(objects, card or label == "neutral")
        card_here = CARD in scene.cells and scene.row_of(CARD) == row
        item_here = item in scene.objects and scene.row_of(item) == row
        if item_here == (label == "entailment") and (elsewhere or item_here or card_here == (label == "neutral")):
            return f"{OBJECTS[item]} is in the {('top', 'bottom')[row]} row", scene


ENTAILMENT_TEMPLATES: tuple[Callable[[_Composer, str, int, bool], Statement], ...] = (
    _there_is,
    _there_are_both,
    _in_row,
)


def load_scene_entailment(split: str = "train") -> Dataset:
    """Statements about one scene each, as records of visual entailment: `image`, `captions`, `label`.

    An object that shows is a fact, one that does not is absent, unless a card may hide it: then the statement is
    neutral. Templates and labels come in turn, so that each is equally frequent in each.
    """

    def rows() -> Iterator[dict]:
        composer = _Composer(split)
        turns = itertools.cycle(itertools.product(ENTAILMENT_TEMPLATES, LABELS, (False, True)))
        for number, (template, label, card) in enumerate(itertools.islice(turns, NUM_SCENES[split])):
            text, scene = template(composer, label, composer.random.randint(2, 3), card)
            yield {
                "image": _png(composer.draw(scene)),
                "image_id": f"{split}-{number}",
                "captions": [text],
                "label": label,
                "pair_id": f"{split}-{number}",
            }

    return Dataset.from_list(list(rows()), features=ENTAILMENT_FEATURES)


REASONING_TEMPLATES: tuple[tuple[str, Callable[[bool, bool], bool]], ...] = (
    ("{} in both pictures", lambda left, right: left and right),
    ("{} in one of the pictures or in both", lambda left, right: left or right),
    ("{} in the left picture", lambda left, right: left),
    ("{} in the right picture", lambda left, right: right),
)


def load_scene_reasoning(split: str = "train") -> Dataset:
    """Statements about two scenes each, as records of two-image reasoning: `images`, `captions`, `label`, `pair_id`.

    The scenes of a pair share an object, and each has one of its own. Of each template there is a true statement and
    a false one about every pair, so that neither the statement nor the pictures alone tell; the ways in which it can
    be so are equally frequent.
    """

    def rows() -> Iterator[dict]:
        composer = _Composer(split)
        ways = list(itertools.product((False, True), repeat=2))
        for number in range(NUM_PAIRS[split]):
            left, right = _two_that_share(composer)
            pictures = [_png(composer.draw(composer.arrange(objects, card=False))) for objects in (left, right)]
            for place, ((text, rule), label) in enumerate(itertools.product(REASONING_TEMPLATES, (True, False))):
                way = composer.random.choice([way for way in ways if rule(*way) == label])
                items = [item for item in range(len(OBJECTS)) if (item in left, item in right) == way]
                yield {
                    "images": pictures,
                    "image_id": f"{split}-{number}",
                    "captions": [text.format(OBJECTS[composer.random.choice(items)])],
                    "label": str(label),
                    "pair_id": f"{split}-{number}-0-{place}",
                }

    return Dataset.from_list(list(rows()), features=REASONING_FEATURES)


def _two_that_share(composer: _Composer) -> tuple[set[int], set[int]]:
    """The objects of two scenes: at least one in both, and at least one in each alone."""
    shared = composer.random.randrange(len(OBJECTS))
    while True:
        left, right = (composer.objects(composer.random.choice((2, 2, 2, 3, 4)), including={shared}) for _ in range(2))
        if left - right and right - left:
            return left, right


def load_scene_phrases(split: str = "train") -> Dataset:
    """Scenes with a caption that names their objects, as records of grounding: `image`, `captions`, `phrases`.

    Sides of the boxes are uniform from 18 to 30 pixels, and places uniform among those without overlap.
    """

    def rows() -> Iterator[dict]:
        composer = _Composer(split)
        for number in range(NUM_SCENES[split]):
            objects = sorted(composer.objects(composer.random.choice((2, 3, 3, 4, 4))))  # few have many scenes alike
            composer.random.shuffle(objects)
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            boxes = _places(composer.random, len(objects))
            for item, (left, top, right, _) in zip(objects, boxes, strict=True):
                picture.paste(composer.pictures[item].resize((right - left, right - left)), (left, top))
            caption, phrases = "", []
            for place, item in enumerate(objects):
                caption += "" if not place else " and " if place == len(objects) - 1 else " "
                phrase = OBJECTS[item]
                phrases.append(
                    {
                        "caption_index": 0,
                        "start": len(caption),
                        "end": len(caption) + len(phrase),
                        "types": [],
                        "boxes": [[float(corner) for corner in boxes[place]]],
                        "phrase_id": f"{split}-{number}-{place}",
                    }
                )
                caption += phrase
            yield {
                "image": _png(picture),
                "image_id": f"{split}-{number}",
                "captions": [caption],
                "phrases": phrases,
                "proposals": [],
                "width": SIDE,
                "height": SIDE,
            }

    return Dataset.from_list(list(rows()), features=PHRASE_FEATURES)


def _places(generator: random.Random, number: int) -> list[tuple[int, int, int, int]]:
    """Boxes of random sizes and places that do not overlap; all are drawn anew when one does."""
    while True:
        boxes = []
        for _ in range(number):
            side = generator.randint(18, 30)
            left, top = generator.randint(0, SIDE - side), generator.randint(0, SIDE - side)
            boxes.append((left, top, left + side, top + side))
        overlap = any(
            a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in itertools.combinations(boxes, 2)
        )
        if not overlap:
            return boxes


def _png(picture: Image.Image) -> dict:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}
