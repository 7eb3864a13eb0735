"""The start of matching in closed form: log-odds that follow the similarity."""

import pytest
import torch
from helpers import small_patches, stir, tiny_processor, tiny_records, training_batch

from tcl_hf import TCLForPreTraining
from tcl_hf.data.kept_states import plain_view_of
from tcl_hf.models.modeling_tcl import log_odds_of
from tcl_hf.training.alignment import align_projections
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.matching_start import multiplied_dimensions, start_matching

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_hidden_layers": 3}


def wide_model(text_config=None, **fields):
    """A tiny model with one fusion layer, wide enough for its 16 features, whose projections are aligned."""
    torch.manual_seed(0)
    model = stir(TCLForPreTraining(small_patches(text_config=WIDE | (text_config or {}), **fields)))
    align_projections(model, tiny_processor(), tiny_records(40), progress=False)
    return model.eval()


@torch.no_grad()
def scores(model, records):
    """Log-odds and similarities divided by the temperature, of all images (rows) and first captions."""
    processor = tiny_processor()
    images = model.tcl.encode_image(torch.stack([plain_view_of(processor, record) for record in records]))
    tokens = processor(text=[record["captions"][0] for record in records], return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    texts = model.tcl.encode_text(ids, mask)
    features = model.tcl.image_features(images), model.tcl.text_features(texts, mask)
    log_odds = [
        [log_odds_of(model.match(texts[t : t + 1, : mask[t].sum()], None, image[None])).item() for t in range(len(ids))]
        for image in images
    ]
    return torch.tensor(log_odds), features[0] @ features[1].mT / model.tcl.temperature


@pytest.mark.parametrize("pooling", [("cls", "cls"), ("mean", "mean"), ("cls_mean", "mean"), ("cls_mean", "cls_mean")])
def test_log_odds_follow_the_similarities_of_pairs_that_were_not_read(pooling):
    model = wide_model(image_pooling=pooling[0], text_pooling=pooling[1])
    records = tiny_records(60)
    held_out = records[40:]
    before, expected = scores(model, held_out)
    assert abs(torch.corrcoef(torch.stack([before.flatten(), expected.flatten()]))[0, 1]) < 0.7
    told = start_matching(model, tiny_processor(), records[:40], batch_size=7)
    log_odds, similarities = scores(model, held_out)
    torch.testing.assert_close(similarities, expected)  # the projections are as they were
    correlation = torch.corrcoef(torch.stack([log_odds.flatten(), similarities.flatten()]))[0, 1]
    assert told > 0.8
    assert correlation > 0.8

    slope = (correlation * log_odds.std() / similarities.std()).item()
    assert slope == pytest.approx(1, abs=0.3)


def test_the_threshold_lies_between_matching_and_other_pairs():
    model = wide_model(image_pooling="cls_mean", text_pooling="mean")
    records = tiny_records(40)
    start_matching(model, tiny_processor(), records)
    log_odds, _ = scores(model, records)
    others = log_odds[~torch.eye(len(records), dtype=torch.bool)]
    assert log_odds.diagonal().mean() > 0 > others.mean()


def test_the_teacher_starts_with_the_same_layer():
    model = wide_model()
    start_matching(model, tiny_processor(), tiny_records(20))
    student, teacher = (tcl.text_model.fusion_layers[0].state_dict() for tcl in (model.tcl, model.teacher.tcl))
    for name in student:
        assert torch.equal(student[name], teacher[name])


def test_every_weight_of_the_layer_can_learn():
    model = wide_model(image_pooling="cls_mean", text_pooling="mean", itm_contrast=True, mlm_weight=0.0, cma_weight=0.0)
    start_matching(model, tiny_processor(), tiny_records(20))
    optimizer = torch.optim.SGD(model.tcl.text_model.fusion_layers[0].parameters(), lr=1e-2)
    batch = {name: value for name, value in training_batch(config=model.config).items() if not name.startswith("mlm")}
    first = {name: p.clone() for name, p in model.tcl.text_model.fusion_layers[0].named_parameters()}
    for _ in range(3):  # weights behind ones that are 0 have a gradient from the second step on
        optimizer.zero_grad()
        model.train()(**batch).loss_itm.backward()
        optimizer.step()
    for name, parameter in model.tcl.text_model.fusion_layers[0].named_parameters():
        assert not torch.equal(parameter, first[name]) or name.endswith("k_proj.bias"), name


def test_what_cannot_be_started_is_refused():
    two = TCLForPreTraining(small_patches(text_config=WIDE | {"num_hidden_layers": 4}))
    with pytest.raises(TrainingError, match="starts one fusion layer, and the model has 2: set num_fusion_layers to 1"):
        start_matching(two, tiny_processor(), tiny_records(4))
    narrow = TCLForPreTraining(small_patches(text_config=WIDE | {"num_attention_heads": 2}))
    with pytest.raises(TrainingError, match="needs a wider fusion layer than one with hidden_size=64, num_attention_h"):
        multiplied_dimensions(narrow.tcl)
    without = TCLForPreTraining(small_patches(text_config=WIDE, itm_weight=0.0))
    with pytest.raises(TrainingError, match="starts matching, and itm_weight is 0"):
        multiplied_dimensions(without.tcl)
    records = tiny_records(2)
    records[0]["image"] = {"bytes": b"not an image", "path": None}
    with pytest.raises(TrainingError, match="needs pairs to start from, and 1 of 2 samples can be used"):
        start_matching(wide_model(), tiny_processor(), records)
