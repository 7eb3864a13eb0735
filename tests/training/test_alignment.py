"""The closed-form start of the projections: canonical correlations, folded into the projections."""

import numpy as np
import pytest
import torch
from helpers import small_patches, stir, tiny_processor, tiny_records

from tcl_hf import TCLForPreTraining
from tcl_hf.training.alignment import align_projections, correlated_maps
from tcl_hf.training.arguments import TrainingError


def pairs(number: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of three common causes among noise, shifted and scaled, with a dimension that never changes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(width: int) -> torch.Tensor:
        return torch.randn(number, width, generator=generator)

    causes = noise(3)
    images = causes @ torch.randn(3, 8, generator=generator) + 0.5 * noise(8)
    texts = causes @ torch.randn(3, 6, generator=generator) + 0.5 * noise(6)
    texts[:, 5] = 7.0
    return 10 * images + 3, texts - 1


def test_dimensions_are_uncorrelated_and_scaled_by_their_correlations():
    images, texts = pairs()
    image_map, text_map = correlated_maps(images, texts, dim=5, ridge=0.0 + 1e-9)
    x, y = image_map(images), text_map(texts)
    torch.testing.assert_close(x.mean(0), torch.zeros(5), rtol=0, atol=1e-3)
    # By numpy: the canonical correlations are the singular values of the product of orthonormal bases.
    bases = [np.linalg.qr((side - side.mean(0)).double().numpy())[0] for side in (images, texts[:, :5])]
    correlations = torch.from_numpy(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)).float()
    assert correlations[2] > 0.7 > 0.3 > correlations[3]
    torch.testing.assert_close(x.mT @ x / 499, torch.diag(correlations**2), rtol=0, atol=3e-3)
    torch.testing.assert_close(y.mT @ y / 499, torch.diag(correlations**2), rtol=0, atol=3e-3)
    torch.testing.assert_close(x.mT @ y / 499, torch.diag(correlations**3), rtol=0, atol=3e-3)


def test_dimensions_beyond_the_smaller_width_are_zero():
    image_map, text_map = correlated_maps(*pairs(), dim=9)
    assert image_map.weight.shape == (9, 8)
    assert text_map.weight.shape == (9, 6)
    assert not image_map.weight[6:].any()
    assert not text_map.bias[6:].any()
    assert torch.stack([image_map.weight.isfinite().all(), text_map.weight.isfinite().all()]).all()


def test_autocast_rounds_no_number_of_a_map():
    sides = pairs()
    exact = correlated_maps(*sides, dim=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = correlated_maps(*sides, dim=5)
    for one, other in zip(exact, found, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)


def test_a_large_ridge_for_texts_only_turns_and_weighs_their_standardised_states():
    images, texts = pairs()
    for text_ridge, is_turned in ((1e6, True), (1e-9, False)):
        _, text_map = correlated_maps(images, texts[:, :5], dim=5, ridge=0.2, text_ridge=text_ridge)
        rows = text_map.weight * texts[:, :5].std(0)
        cosines = torch.nn.functional.normalize(rows, dim=1)
        assert torch.allclose(cosines @ cosines.mT, torch.eye(5), atol=1e-3) == is_turned
    same = correlated_maps(images, texts, dim=5, ridge=0.2), correlated_maps(images, texts, 5, 0.2, text_ridge=0.2)
    assert torch.equal(same[0][1].weight, same[1][1].weight)


def test_a_run_chooses_the_ridges():
    model = TCLForPreTraining(small_patches())
    found = []
    for ridge in (0.1, 5.0):
        align_projections(model, tiny_processor(), tiny_records(9), ridge=ridge, text_ridge=0.1, progress=False)
        found.append(model.tcl.visual_projection.weight.norm())
    assert found[1] < 0.5 * found[0]  # a larger ridge shrinks the map


def test_held_out_pairs_are_found_by_their_features():
    images, texts = pairs(1000)
    image_map, text_map = correlated_maps(images[:900], texts[:900], dim=6)
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (image_map(images[900:]), text_map(texts[900:])))
    found = (x @ y.T).argsort(1, descending=True)[:, :10] == torch.arange(100)[:, None]
    assert found.any(1).float().mean() > 0.8  # 0.1 by chance


@pytest.mark.parametrize("pooling", [("cls", "cls"), ("cls_mean", "mean")])
def test_projections_of_student_and_teacher_start_at_the_maps(pooling):
    fields = {"image_pooling": pooling[0], "text_pooling": pooling[1]}
    model, processor = stir(TCLForPreTraining(small_patches(**fields))), tiny_processor()
    records = tiny_records(12)
    assert align_projections(model, processor, records, batch_size=5, progress=False) == sum(
        len(record["captions"]) for record in records
    )
    pooled = []
    with torch.no_grad():
        model.eval()
        for record in records:
            from tcl_hf.data.images import open_image

            pixels = processor(images=[open_image(record["image"]).convert("RGB")], return_tensors="pt")["pixel_values"]
            for caption in record["captions"]:
                tokens = processor(text=[caption], return_tensors="pt")
                text = model.tcl.encode_text(tokens["input_ids"], tokens["attention_mask"])
                pooled.append((model.tcl.pool_image(model.tcl.encode_image(pixels))[0], model.tcl.pool_text(text)[0]))
    images, texts = (torch.stack(side) for side in zip(*pooled, strict=True))
    image_map, text_map = correlated_maps(images, texts, dim=16)
    for tcl in (model.tcl, model.teacher.tcl):
        expected = torch.nn.functional.normalize(image_map(images), dim=1)
        found = torch.nn.functional.normalize(tcl.visual_projection(images), dim=1)
        torch.testing.assert_close((found * expected).sum(1), torch.ones(len(images)), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            torch.nn.functional.normalize(tcl.text_projection(texts), dim=1),
            torch.nn.functional.normalize(text_map(texts), dim=1),
            rtol=0,
            atol=2e-2,
        )


def test_too_few_pairs_are_refused():
    records = tiny_records(3)
    for record in records[1:]:
        record["image"] = {"bytes": b"not an image", "path": None}
    records[0]["captions"] = records[0]["captions"][:1]
    model = TCLForPreTraining(small_patches())
    with pytest.raises(TrainingError, match="needs pairs to start the projections from, and 1 of 3 samples"):
        align_projections(model, tiny_processor(), records, progress=False)
