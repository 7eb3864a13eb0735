"""Masking by BERT's rule, and views by the paper's augmentation."""

import io

import numpy as np
import pytest
import torch
from helpers import png, tiny_processor, tiny_records
from PIL import Image

from tcl_hf.data.augmentation import RandomOperations, TCLAugmentation
from tcl_hf.data.collators import TCLPreTrainingCollator, mask_tokens, masked_positions
from tcl_hf.data.sampling import Visit

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_masking_rule_case_by_case():
    input_ids = torch.tensor([[2, 10, 11, 12, 13, 0]])
    maskable = torch.tensor([[False, True, True, True, True, False]])
    uniform = torch.tensor([[[0.0, 0.0], [0.14, 0.79], [0.14, 0.85], [0.14, 0.95], [0.16, 0.0], [0.0, 0.0]]])
    random_ids = torch.full((1, 6), 77)
    masked, labels = mask_tokens(input_ids, maskable, 0.15, 4, uniform, random_ids)
    assert masked.tolist() == [[2, 4, 77, 12, 13, 0]]
    assert labels.tolist() == [[-100, 10, 11, 12, -100, -100]]


def test_masking_frequencies():
    """200,000 tokens: the shares are within four standard deviations of 15 %, and of 80, 10 and 10 % of these."""
    torch.manual_seed(0)
    number = 200_000
    input_ids = torch.full((1, number), 5)
    uniform, random_ids = torch.rand(1, number, 2), torch.randint(100, 200, (1, number))
    masked, labels = mask_tokens(input_ids, torch.ones(1, number, dtype=torch.bool), 0.15, 4, uniform, random_ids)
    chosen = labels != -100
    assert abs(chosen.sum() - 0.15 * number) < 4 * (number * 0.15 * 0.85) ** 0.5
    total = int(chosen.sum())
    for share, count in ((0.8, masked == 4), (0.1, masked >= 100), (0.1, chosen & (masked == 5))):
        assert abs(count.sum() - share * total) < 4 * (total * share * (1 - share)) ** 0.5
    assert (masked[~chosen] == 5).all()


def test_masked_positions_list_every_label_once():
    labels = torch.full((3, 7), -100)
    labels[0, [1, 4, 6]] = 1
    labels[1, 2] = 1
    positions = masked_positions(labels, multiple_of=2)
    assert positions.tolist() == [[1, 4, 6, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]
    assert masked_positions(torch.full((2, 3), -100)).shape == (2, 3)  # never wider than the text
    assert (masked_positions(torch.full((2, 3), -100)) == -1).all()


def test_a_batch_has_everything_the_model_needs():
    processor = tiny_processor()
    records = tiny_records(6)
    records[0]["captions"] = ["dog " * 60]
    batch = TCLPreTrainingCollator(processor)(records)
    assert set(batch) == {
        *("pixel_values", "pixel_values_augmented", "input_ids", "attention_mask"),
        *("mlm_input_ids", "mlm_labels", "mlm_positions"),
    }
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert not torch.equal(batch["pixel_values"], batch["pixel_values_augmented"])
    assert batch["input_ids"].shape == (6, 25)
    assert (batch["input_ids"][:, 0] == processor.tokenizer.cls_token_id).all()
    assert processor.tokenizer.sep_token_id not in batch["input_ids"]
    special = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.tokenizer.cls_token_id)
    assert (batch["mlm_labels"][special] == -100).all()
    chosen = batch["mlm_labels"] != -100
    assert (batch["mlm_labels"][chosen] == batch["input_ids"][chosen]).all()
    assert (batch["mlm_input_ids"][~chosen] == batch["input_ids"][~chosen]).all()


def test_albef_batches_have_one_view_and_pure_contrast_no_masks():
    batch = TCLPreTrainingCollator(tiny_processor(), two_views=False, mlm_probability=0.0)(tiny_records(2))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}


def test_random_choices_follow_from_the_visit_and_leave_the_global_generator_alone():
    collator = TCLPreTrainingCollator(tiny_processor())
    records = [{**record, "visit": Visit(0, 0, n)} for n, record in enumerate(tiny_records(4))]
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = collator(records)
    assert torch.equal(torch.rand(3), expected_next)
    torch.manual_seed(6)
    second = collator(records)
    assert all(torch.equal(first[name], second[name]) for name in first)
    later = collator([{**record, "visit": Visit(0, 1, n)} for n, record in enumerate(tiny_records(4))])
    assert not torch.equal(first["pixel_values"], later["pixel_values"])


def test_every_caption_is_chosen_in_time():
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0.0)
    record = {"image": {"bytes": png(0)}, "captions": ["dog", "cat", "", "house"]}
    torch.manual_seed(0)
    texts = {
        collator.processor.tokenizer.decode(collator([record])["input_ids"][0], skip_special_tokens=True)
        for _ in range(40)
    }
    assert texts == {"dog", "cat", "house"}


def test_texts_are_cleaned_unless_the_processor_does_not():
    record = {"image": {"bytes": png(0)}, "captions": ["A Dog!!"]}
    processor = tiny_processor()
    lengths = []
    for clean in (True, False):
        processor.clean_text = clean
        lengths.append(TCLPreTrainingCollator(processor)([record])["input_ids"].shape[1])
    assert lengths == [3, 5]


def test_an_open_image_of_the_caller_stays_as_it_is():
    file = io.BytesIO()
    Image.new("RGB", (800, 600)).save(file, "JPEG")
    image = Image.open(file)
    TCLPreTrainingCollator(tiny_processor())([{"image": image, "captions": ["a dog"]}])
    assert image.size == (800, 600)
    image.load()


# Views


def test_views_are_normalised_and_of_the_right_size():
    augmentation = TCLAugmentation(24, MEAN, STD)
    views = augmentation(Image.open(io.BytesIO(png(0, (50, 70)))), 2)
    assert len(views) == 2
    for view in views:
        assert view.shape == (3, 24, 24) and view.dtype == torch.float32
        assert view.min() >= -2 and view.max() <= 2


def test_without_changes_a_view_is_the_resized_image():
    """Whole-image crop, no jitter, no operations: a flip is all that may happen."""
    augmentation = TCLAugmentation(20, MEAN, STD, crop_scale=(1.0, 1.0), color_jitter=False, num_operations=0)
    image = Image.open(io.BytesIO(png(3, (40, 40)))).convert("RGB")
    expected = torch.from_numpy(np.array(image.resize((20, 20), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    expected = (expected - 0.5) / 0.25
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        (view,) = augmentation(image.copy())
        flipped = torch.allclose(view, expected.flip(-1), atol=1e-6)
        assert flipped or torch.allclose(view, expected, atol=1e-6)
        seen.add(flipped)
    assert seen == {True, False}


def test_grey_and_transparent_images_give_views():
    augmentation = TCLAugmentation(16, MEAN, STD)
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        (view,) = augmentation(Image.new(mode, (30, 20)))
        assert view.shape == (3, 16, 16)


def test_a_large_jpeg_is_decoded_at_reduced_scale():
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1600, 1200)).save(file, "JPEG")
    image = Image.open(file)
    augmentation = TCLAugmentation(64, MEAN, STD, crop_scale=(0.9, 1.0), color_jitter=False, num_operations=0)
    (view,) = augmentation(image)
    assert image.size == (200, 150)  # an eighth: the crops have still more than 64 pixels
    assert view.shape == (3, 64, 64)


def arrow() -> Image.Image:
    """A white spot on black, right of and below the middle."""
    pixels = np.zeros((41, 41, 3), dtype=np.uint8)
    pixels[28:31, 30:33] = 255
    return Image.fromarray(pixels)


def spot(image: Image.Image) -> tuple[float, float]:
    """Row and column of the white spot."""
    weight = np.asarray(image)[..., 0].astype(float)
    weight[weight < 200] = 0
    rows, columns = np.indices(weight.shape)
    return (rows * weight).sum() / weight.sum(), (columns * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("name", "sign", "row", "column"),
    [
        ("identity", 1, 29, 31),
        ("translate_x", 1, 29, 24),
        ("translate_x", -1, 29, 38),
        ("translate_y", 1, 22, 31),
        ("shear_x", 1, 29, 31 + 0.21 * 29),
        ("shear_y", -1, 29 - 0.21 * 31, 31),
    ],
)
def test_operations_move_the_image_as_far_as_the_paper_says(name, sign, row, column):
    found = spot(RandomOperations().apply(arrow(), name, sign))
    assert found == pytest.approx((row, column), abs=0.6)


@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_turns_by_21_degrees_about_the_middle(sign):
    row, column = spot(RandomOperations().apply(arrow(), "rotate", sign))
    before = np.arctan2(-(29 - 20), 31 - 20)
    after = np.arctan2(-(row - 20), column - 20)
    assert np.degrees(after - before) == pytest.approx(sign * 21, abs=2)


def test_moved_images_are_filled_with_grey():
    for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        pixels = np.asarray(RandomOperations().apply(Image.new("RGB", (40, 40)), name, 1))
        assert (pixels == 128).any()


def test_brightness_and_sharpness_use_the_paper_s_factor():
    image = Image.new("RGB", (8, 8), (100, 50, 200))
    assert RandomOperations().apply(image, "brightness", 1).getpixel((0, 0)) == (136, 68, 255)
    assert RandomOperations().apply(image, "sharpness", 1).getpixel((4, 4)) == (100, 50, 200)


def test_autocontrast_and_equalize_spread_the_values():
    image = Image.fromarray(np.linspace(100, 150, 4096, dtype=np.uint8).reshape(64, 64)).convert("RGB")
    for name in ("autocontrast", "equalize"):
        pixels = np.asarray(RandomOperations().apply(image, name, 1))
        assert pixels.min() == 0 and pixels.max() == 255


def test_operations_are_drawn_evenly_and_applied_half_the_time(monkeypatch):
    names = []
    monkeypatch.setattr(RandomOperations, "apply", lambda self, image, name, sign: names.append(name) or image)
    torch.manual_seed(0)
    operations, image = RandomOperations(2), Image.new("RGB", (4, 4))
    for _ in range(2000):
        operations(image)
    assert 1870 < len(names) < 2130  # 4,000 draws, half of them applied: 2,000 +- 4 standard deviations
    counts = [names.count(name) for name in RandomOperations.NAMES]
    assert min(counts) > 145 and max(counts) < 255
