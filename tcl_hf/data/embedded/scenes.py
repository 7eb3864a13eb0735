"""Small embedded data for the tasks: scenes composed of OpenMoji pictures, with statements or phrases about them.

A scene is white and shows 2 to 4 different objects, out of 12 pictures that pre-training on OpenMoji has seen. For
statements, the objects are in a 2 x 2 grid. One of the cells may hold a closed card, which hides one more object that
is not visible elsewhere in the scene. The hidden object cannot be inferred, and only this makes a statement *neutral*.
For grounding, the objects have random sizes and places and do not overlap.

12 of the 66 combinations of two objects are held out: the objects are put on a circle in a random order of fixed seed,
and each is held out with its neighbours. No training scene shows both objects of a held-out combination, and every
validation scene does.

In each template the labels are equally frequent, so that the statement alone does not give away its label, and half of
the pictures of entailed statements have a card. Statements begin with the object, like the names that pre-training has
read: a small model learns such statements in minutes, and does not learn "there is a ..." in that time.
"""

import functools
import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from datasets import Dataset
from PIL import Image, ImageDraw

from ...models.modeling_tcl_tasks import ENTAILMENT_LABELS, REASONING_LABELS
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
NUM_SCENE_PAIRS = {"train": 5_000, "validation": 225}  # each with 8 statements

CARD = -1  # in the place of an object's number


@dataclass(frozen=True)
class Scene:
    """The contents of the cells 0 to 3 (row by row): an object's number, `CARD`, or None."""

    cells: tuple[int | None, ...]

    @property
    def objects(self) -> set[int]:
        """The visible objects."""
        return {cell for cell in self.cells if cell is not None and cell != CARD}

    def row_of(self, item: int) -> int:
        """0 if an object or the card is in the top row, 1 if it is in the bottom row."""
        return self.cells.index(item) // 2


@functools.cache
def _pictures() -> list[Image.Image]:
    """The pictures of the objects, in their order."""
    rows = load_openmoji("train", size=CELL)
    pictures = {row["captions"][0]: row["image"]["bytes"] for row in rows}
    return [Image.open(io.BytesIO(pictures[name])).convert("RGB") for name in OBJECTS]


class SceneComposer:
    """Draws the objects, the arrangements and the pictures of one split.

    Args:
        split: "train" or "validation".

    Raises:
        ValueError: if the split does not exist.
    """

    def __init__(self, split: str):
        if split not in NUM_SCENES:
            raise ValueError(f"scenes have no split '{split}': choose one of {', '.join(NUM_SCENES)}.")
        self.split = split
        self.random = random.Random(f"{SEED}-{split}")
        circle = list(range(len(OBJECTS)))
        random.Random(SEED).shuffle(circle)
        self.held_out = set(map(frozenset, zip(circle, [*circle[1:], circle[0]], strict=True)))  # combinations of two
        self.pictures = _pictures()

    def objects(self, number: int, *, including: Iterable[int] = (), excluding: Iterable[int] = ()) -> set[int]:
        """Draw `number` different objects, in a combination that the split may show."""
        including = set(including)
        others = [item for item in range(len(OBJECTS)) if item not in including.union(excluding)]
        while True:
            drawn = including.union(self.random.sample(others, number - len(including)))
            combinations = map(frozenset, itertools.combinations(drawn, 2))
            if any(two in self.held_out for two in combinations) == (self.split == "validation"):
                return drawn

    def arrange(self, objects: set[int], card: bool) -> Scene:
        """Put objects, and a card if asked for, into random cells."""
        cells: list[int | None] = [*sorted(objects), *([CARD] if card else [])]
        cells += [None] * (4 - len(cells))
        self.random.shuffle(cells)
        return Scene(tuple(cells))

    def draw(self, scene: Scene) -> Image.Image:
        """Return the picture of a scene, `SIDE` pixels square."""
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        for number, cell in enumerate(scene.cells):
            left, top = number % 2 * CELL, number // 2 * CELL
            if cell == CARD:
                box = (left + 3, top + 3, left + CELL - 4, top + CELL - 4)
                ImageDraw.Draw(picture).rectangle(box, fill=(90, 90, 90), outline=(30, 30, 30), width=2)
            elif cell is not None:
                picture.paste(self.pictures[cell], (left, top))
        return picture


# Visual entailment. Each template makes a statement of a given label, and a scene of `number` objects; with `card`, the
# scene of an entailed statement has a card.

Statement = tuple[str, Scene]


def _has_card(label: str, card: bool) -> bool:
    """Whether a scene has a card: a neutral statement needs it, a contradiction must not have it."""
    return label == "neutral" or (label == "entailment" and card)


def _there_is(composer: SceneComposer, label: str, number: int, card: bool) -> Statement:
    """Make "X is there".

    Entailed if X is visible; contradicted if it is not and there is no card; neutral if it is not and there is one.
    """
    item = composer.random.randrange(len(OBJECTS))
    shown = {"including": {item}} if label == "entailment" else {"excluding": {item}}
    objects = composer.objects(number, **shown)
    return f"{OBJECTS[item]} is there", composer.arrange(objects, _has_card(label, card))


def _there_are_both(composer: SceneComposer, label: str, number: int, card: bool) -> Statement:
    """Make "X and Y are there".

    Entailed if both are visible; contradicted if one or both are not and there is no card; neutral if one is not and
    there is a card.
    """
    first, second = composer.random.sample(range(len(OBJECTS)), 2)
    while (frozenset((first, second)) in composer.held_out) != (composer.split == "validation"):
        first, second = composer.random.sample(range(len(OBJECTS)), 2)
    shown = {"including": {first}, "excluding": {second}}
    if label == "entailment":
        shown = {"including": {first, second}}
    elif label == "contradiction" and composer.random.random() < 0.5:
        shown = {"excluding": {first, second}}
    names = [OBJECTS[first], OBJECTS[second]]
    composer.random.shuffle(names)
    objects = composer.objects(number, **shown)
    return f"{names[0]} and {names[1]} are there", composer.arrange(objects, _has_card(label, card))


def _in_row(composer: SceneComposer, label: str, number: int, card: bool) -> Statement:
    """Make "X is in the top row", or the bottom row.

    Entailed if X is there; contradicted if it is in the other row, or is not visible and there is no card in this row;
    neutral if it is not visible and there is a card in this row.
    """
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


ENTAILMENT_TEMPLATES = (_there_is, _there_are_both, _in_row)


def load_scene_entailment(split: str = "train") -> Dataset:
    """Compose statements about one scene each, as records of visual entailment: `image`, `captions`, `label`.

    A visible object is there, and one that is not visible is absent, unless a card may hide it: then the statement is
    neutral. Templates and labels come in turn, so that each template has each label equally often.

    Raises:
        ValueError: if the split does not exist.
        ImportError: if the packages that carry the pictures are missing.
    """

    def rows() -> Iterator[dict]:
        composer = SceneComposer(split)
        turns = itertools.cycle(itertools.product(ENTAILMENT_TEMPLATES, ENTAILMENT_LABELS, (False, True)))
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


# Two-image reasoning. A template is a text, and its truth given whether the object is in the left and right scene.

REASONING_TEMPLATES: tuple[tuple[str, Callable[[bool, bool], bool]], ...] = (
    ("{} in both pictures", lambda left, right: left and right),
    ("{} in one of the pictures or in both", lambda left, right: left or right),
    ("{} in the left picture", lambda left, right: left),
    ("{} in the right picture", lambda left, right: right),
)


def load_scene_reasoning(split: str = "train") -> Dataset:
    """Compose statements about two scenes each, as records of reasoning: `images`, `captions`, `label`, `pair_id`.

    The two scenes share an object, and each has an object that the other does not have. Each template makes a true and
    a false statement about them, so that neither the statement nor the pictures alone give away the label. The cases
    in which a statement is true (the object in both scenes, or in the left one only ...) are equally likely, and so
    are those in which it is false.

    Raises:
        ValueError: if the split does not exist.
        ImportError: if the packages that carry the pictures are missing.
    """

    def rows() -> Iterator[dict]:
        composer = SceneComposer(split)
        cases = list(itertools.product((False, True), repeat=2))  # in the left scene, in the right scene
        for number in range(NUM_SCENE_PAIRS[split]):
            left, right = _two_that_share(composer)
            pictures = [_png(composer.draw(composer.arrange(objects, card=False))) for objects in (left, right)]
            for place, ((text, rule), truth) in enumerate(itertools.product(REASONING_TEMPLATES, (True, False))):
                case = composer.random.choice([case for case in cases if rule(*case) == truth])
                items = [item for item in range(len(OBJECTS)) if (item in left, item in right) == case]
                yield {
                    "images": pictures,
                    "image_id": f"{split}-{number}",
                    "captions": [text.format(OBJECTS[composer.random.choice(items)])],
                    "label": REASONING_LABELS[truth],
                    "pair_id": f"{split}-{number}-0-{place}",
                }

    return Dataset.from_list(list(rows()), features=REASONING_FEATURES)


def _two_that_share(composer: SceneComposer) -> tuple[set[int], set[int]]:
    """The objects of two scenes: at least one is in both, and each has at least one that the other does not have."""
    shared = composer.random.randrange(len(OBJECTS))
    while True:
        left, right = (composer.objects(composer.random.choice((2, 2, 2, 3, 4)), including={shared}) for _ in range(2))
        if left - right and right - left:
            return left, right


# Grounding


def load_scene_phrases(split: str = "train") -> Dataset:
    """Compose scenes with a caption that names their objects, as records of grounding: `image`, `captions`, `phrases`.

    The sides of the boxes are uniform from 18 to 30 pixels, and their places uniform among those without overlap.

    Raises:
        ValueError: if the split does not exist.
        ImportError: if the packages that carry the pictures are missing.
    """

    def rows() -> Iterator[dict]:
        composer = SceneComposer(split)
        for number in range(NUM_SCENES[split]):
            # Two objects are drawn less often: they have few combinations, so that their scenes resemble each other.
            objects = sorted(composer.objects(composer.random.choice((2, 3, 3, 4, 4))))
            composer.random.shuffle(objects)
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            caption, phrases = "", []
            for place, box in enumerate(_places(composer.random, len(objects))):
                left, top, right, _ = box
                picture.paste(composer.pictures[objects[place]].resize((right - left, right - left)), (left, top))
                caption += "" if not place else " and " if place == len(objects) - 1 else " "
                phrase = OBJECTS[objects[place]]
                span = {"caption_index": 0, "start": len(caption), "end": len(caption) + len(phrase), "types": []}
                phrases.append(span | {"boxes": [list(map(float, box))], "phrase_id": f"{split}-{number}-{place}"})
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
    """Boxes (left, top, right, bottom) of random sizes and places; all are drawn again while any two overlap."""
    while True:
        boxes = []
        for _ in range(number):
            side = generator.randint(18, 30)
            left, top = generator.randint(0, SIDE - side), generator.randint(0, SIDE - side)
            boxes.append((left, top, left + side, top + side))
        pairs = itertools.combinations(boxes, 2)
        if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs):
            return boxes


def _png(picture: Image.Image) -> dict:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}
