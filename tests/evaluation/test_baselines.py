"""Baselines find a known linear map, and equal closed forms."""

import numpy as np
import pytest
import torch
from helpers import png, tiny, tiny_records
from torch.nn import functional as F

from tcl_hf import TCLModel
from tcl_hf.evaluation.baselines import (
    ended,
    frozen_features,
    image_features_of,
    linear_on_features,
    ridge_baseline,
    ridge_on_features,
    ridge_scores,
    text_features_of,
)
from tcl_hf.evaluation.metrics import retrieval_metrics

TRAIN, HELD_OUT, WIDTH, TEXT_WIDTH = 400, 60, 8, 6


@pytest.fixture(scope="module")
def mapped():
    """Text features that are a linear map of image features, to fit on and to rank."""
    generator = torch.Generator().manual_seed(0)
    image = 3 + torch.randn(TRAIN + HELD_OUT, WIDTH, generator=generator) * torch.linspace(0.1, 5, WIDTH)
    text = (image - 3) @ torch.randn(WIDTH, TEXT_WIDTH, generator=generator) + 20
    return image[:TRAIN], text[:TRAIN], image[TRAIN:], text[TRAIN:], torch.arange(HELD_OUT)


def numpy_scores(train_image, train_text, image, text, strength):
    """The dual form of ridge regression, over samples and not over features."""
    train_image, train_text, image, text = (x.double().numpy() for x in (train_image, train_text, image, text))
    mean, std = train_image.mean(0), train_image.std(0, ddof=1)
    inputs, image = (train_image - mean) / std, (image - mean) / std
    centre = train_text.mean(0)
    duals = np.linalg.solve(inputs @ inputs.T + strength * np.eye(len(inputs)), train_text - centre)
    predicted, true = image @ inputs.T @ duals, text - centre
    norms = np.linalg.norm(predicted, axis=1)[:, None] * np.linalg.norm(true, axis=1)
    return torch.from_numpy(predicted @ true.T / norms)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_ridge_scores_equal_the_dual_form(mapped, strength):
    *features, _ = mapped
    expected = numpy_scores(*features, strength)
    torch.testing.assert_close(ridge_scores(*features, strength), expected, rtol=0, atol=1e-12)


def test_ridge_finds_a_linear_map(mapped):
    scores = ridge_scores(*mapped[:4], strength=1e-6)
    assert retrieval_metrics(scores, scores, mapped[4])["recall@1"] == 100
    torch.testing.assert_close(scores.diagonal(), torch.ones(HELD_OUT, dtype=torch.double), rtol=0, atol=1e-9)


def test_ridge_normalises_text_features(mapped):
    train_image, train_text, image, text, rows = mapped
    unit = (F.normalize(train_text, dim=-1), F.normalize(text, dim=-1))
    expected = numpy_scores(train_image, unit[0], image, unit[1], 100.0)
    assert ridge_on_features(*mapped) == retrieval_metrics(expected, expected, rows)
    scale = 1 + torch.rand(HELD_OUT, 1, generator=torch.Generator().manual_seed(0))
    assert ridge_on_features(train_image, 7 * train_text, image, scale * text, rows) == ridge_on_features(*mapped)


def test_an_image_with_several_texts_is_fitted_to_all_of_its_pairs(mapped):
    """With 2 texts for each image, the fit to the pairs has twice the penalty."""
    train_image, train_text, image, text, rows = mapped
    noise = torch.randn(2 * TRAIN, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    texts, owner = train_text.repeat(2, 1) + noise, torch.arange(TRAIN).repeat(2)
    unit = (F.normalize(texts, dim=-1), F.normalize(text, dim=-1))
    # Standard deviations of 800 rows and of 400 rows, each twice, differ by sqrt(799 / 798), which scales the penalty.
    strength = 50.0 * 2 * (2 * TRAIN - 1) / (2 * TRAIN - 2)
    expected = numpy_scores(train_image[owner], unit[0], image, unit[1], strength)
    found = ridge_on_features(train_image, texts, image, text, rows, 50.0, train_image_of_text=owner)
    assert found == retrieval_metrics(expected, expected, rows)


def test_constant_features_do_no_harm(mapped):
    train_image, train_text, image, text, rows = mapped
    wider = (torch.cat([x, torch.full((len(x), 1), 7.0)], dim=1) for x in (train_image, image))
    train_wider, image_wider = wider
    assert ridge_on_features(train_wider, train_text, image_wider, text, rows) == ridge_on_features(*mapped)


def test_linear_layers_find_a_linear_map(mapped):
    metrics = linear_on_features(*mapped, projection_dim=16, num_train_epochs=60, batch_size=50, learning_rate=1e-2)
    assert metrics["recall@1"] > 90


def test_linear_layers_find_nothing_where_there_is_nothing(mapped):
    train_image, train_text, image, text, rows = mapped
    shuffled = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))
    metrics = linear_on_features(train_image, train_text[shuffled], image, text, rows, num_train_epochs=3)
    assert metrics["recall@10"] < 40  # chance is 16.7


def test_linear_layers_follow_from_the_seed_and_leave_the_random_state(mapped):
    options = {"num_train_epochs": 2, "batch_size": 64, "projection_dim": 4}
    before = torch.get_rng_state()
    first = linear_on_features(*mapped, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert linear_on_features(*mapped, **options) == first
    assert linear_on_features(*mapped, **options, seed=1) != first


def test_linear_layers_draw_a_text_of_the_image(mapped):
    """The first text of each image is noise and the second is true, in another order: half of the steps are right."""
    train_image, train_text, image, text, rows = mapped
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))
    noise = 20 + 5 * torch.randn(TRAIN, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    texts, owner = torch.cat([noise, train_text[order]]), torch.cat([torch.arange(TRAIN), order])
    options = {"projection_dim": 16, "num_train_epochs": 40, "batch_size": 50, "learning_rate": 1e-2}
    assert linear_on_features(train_image, texts, image, text, rows, owner, **options)["recall@5"] > 90
    wrong = torch.cat([torch.arange(TRAIN), torch.arange(TRAIN)])
    assert linear_on_features(train_image, texts, image, text, rows, wrong, **options)["recall@5"] < 40


# Features


def test_features_pool_states_as_a_loop_does():
    generator = torch.Generator().manual_seed(0)
    states, mask = torch.randn(3, 5, 4, generator=generator), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1] * 5])
    images, texts = image_features_of(states), text_features_of(states, mask)
    for row in range(3):
        patches = [states[row, place] for place in range(1, 5)]
        torch.testing.assert_close(images[row], torch.cat([states[row, 0], sum(patches) / 4]))
        tokens = [states[row, place] for place in range(5) if mask[row, place]]
        torch.testing.assert_close(texts[row], sum(tokens) / len(tokens))


def test_a_text_ends_behind_its_last_token():
    ids, mask = ended(torch.tensor([[2, 7, 8], [2, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), end=3)
    assert ids.tolist() == [[2, 7, 8, 3], [2, 9, 3, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_frozen_features_are_those_of_the_encoders_one_record_at_a_time():
    model, processor = tiny(TCLModel)
    model.train()
    records = tiny_records(5)
    found = frozen_features(model, processor, records, batch_size=2)
    assert model.training and found.image.shape == (5, 48) and found.text.shape == (10, 32)
    assert found.image_of_text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    model.eval()
    end = torch.tensor([[processor.tokenizer.sep_token_id]])
    for row, record in enumerate(records):
        picture = frozen_features(model, processor, [record], captions_per_image=1)
        torch.testing.assert_close(picture.image[0], found.image[row])
        tokens = processor(text=record["captions"][0], return_tensors="pt")
        with torch.no_grad():
            states = model.text_model.encode(torch.cat([tokens["input_ids"], end], dim=1)).last_hidden_state
        torch.testing.assert_close(picture.text[0], states[0].mean(0))
        torch.testing.assert_close(found.text[2 * row], states[0].mean(0))


def test_records_that_cannot_be_used_have_no_features():
    model, processor = tiny(TCLModel)
    good = {"image": {"bytes": png(0), "path": None}, "captions": ["a dog", " ", "cat"], "image_id": "0"}
    bad = [good | {"image": {"bytes": b"broken", "path": None}}, good | {"captions": []}, good | {"captions": None}]
    found = frozen_features(model, processor, [*bad, good, *bad, good], batch_size=3)
    assert found.image.shape[0] == 2 and found.image_of_text.tolist() == [0, 0, 1, 1]


def test_ridge_on_coarse_pixels_finds_pictures_that_repeat():
    records = tiny_records(12)
    assert ridge_baseline(records, records, strength=0.1)["recall@1"] > 80
