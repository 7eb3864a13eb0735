"""Metrics equal counts by hand; re-ranking equals a plain loop over pairs."""

import pytest
import torch
from helpers import small_patches, tiny, tiny_processor, tiny_records

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.evaluation.baselines import ridge_baseline
from tcl_hf.evaluation.metrics import retrieval_metrics, retrieval_ranks
from tcl_hf.evaluation.retrieval import (
    MAX_PADDING,
    NOT_SCORED,
    candidates,
    chance_recall,
    encode_samples,
    evaluate_retrieval,
    matching_scores,
    sizes_by_length,
)

# Two texts for each of four images, scores made by hand.
SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.8, 0.2, 0.0, 0.0, 0.0, 0.0],  # its texts are 0, 1: the better one is first
        [0.7, 0.6, 0.3, 0.5, 0.0, 0.0, 0.0, 0.0],  # its texts are 2, 3: the better one is third
        [
            0.4,
            0.4,
            0.4,
            0.4,
            0.4,
            0.4,
            0.4,
            0.4,
        ],  # its texts are 4, 5: all are equal, the six others count as before them
        [0.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.2, 0.8],  # its texts are 6, 7: the better one is second
    ]
)
IMAGE_OF_TEXT = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def test_ranks_of_a_matrix_counted_by_hand():
    image_ranks, text_ranks = retrieval_ranks(SCORES, SCORES, IMAGE_OF_TEXT)
    assert image_ranks.tolist() == [0, 2, 6, 1]
    # By column: 0.9 first; 0.1 behind 0.6 and 0.4; 0.3 behind 0.8 and 0.4; 0.5 first; 0.4 behind 0.9; 0.4 first;
    # 0.2 behind 0.4; 0.8 first.
    assert text_ranks.tolist() == [0, 2, 2, 0, 1, 0, 1, 0]


def test_recall_of_a_matrix_counted_by_hand():
    metrics = retrieval_metrics(SCORES, SCORES, IMAGE_OF_TEXT)
    assert metrics["i2t_recall@1"] == 25
    assert metrics["i2t_recall@5"] == 75
    assert metrics["i2t_recall@10"] == 100
    assert metrics["t2i_recall@1"] == 50
    assert metrics["t2i_recall@5"] == 100
    assert metrics["recall@1"] == 37.5


def test_a_model_with_equal_scores_for_all_pairs_recalls_nothing():
    equal = torch.zeros(20, 20)
    assert retrieval_metrics(equal, equal, torch.arange(20))["recall@10"] == 0


def test_each_direction_uses_its_own_scores():
    good, bad = torch.eye(3), -torch.eye(3)
    metrics = retrieval_metrics(good, bad, torch.arange(3))
    assert (metrics["i2t_recall@1"], metrics["t2i_recall@1"]) == (100, 0)


def test_chance_is_k_of_the_images():
    assert chance_recall(384) == pytest.approx(100 / 384)
    assert chance_recall(4, 10) == 100


def test_candidates_are_the_union_of_both_directions():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3]])
    chosen = [texts.tolist() for texts in candidates(similarity, 1)]
    # Image 0 takes text 0, image 1 takes text 0; text 0 takes image 0, texts 1 and 2 take image 1.
    assert chosen == [[0], [0, 1, 2]]


@pytest.fixture(scope="module")
def encoded():
    torch.manual_seed(0)
    model = TCLForImageTextRetrieval(small_patches()).eval()
    return model, encode_samples(model, tiny_processor(), tiny_records(7), batch_size=3)


def test_encoding_in_batches_equals_the_forward(encoded):
    model, samples = encoded
    assert samples.image_embeds.shape == (7, 16) and samples.text_embeds.shape == (14, 16)
    assert samples.image_of_text.tolist() == [n for n in range(7) for _ in range(2)]
    tokens = tiny_processor()(text=samples.texts, return_tensors="pt")
    with torch.no_grad():
        expected = model.tcl.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(samples.text_embeds, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_matching_scores_equal_the_plain_loop_over_pairs(encoded, k):
    model, samples = encoded
    scores = matching_scores(model, samples, k, batch_size=2)
    similarity = samples.image_embeds @ samples.text_embeds.T
    wanted = torch.zeros_like(similarity, dtype=torch.bool)
    for i in range(7):
        wanted[i, similarity[i].argsort(descending=True)[:k]] = True
    for t in range(14):
        wanted[similarity[:, t].argsort(descending=True)[:k], t] = True
    for i in range(7):
        for t in range(14):
            if not wanted[i, t]:
                assert scores[i, t] == NOT_SCORED
                continue
            with torch.no_grad():
                plain = model.match(
                    samples.text_states[t : t + 1], samples.attention_mask[t : t + 1], samples.image_states[i : i + 1]
                )
            assert scores[i, t].item() == pytest.approx(plain[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_texts_of_about_the_same_length_are_matched_together(size):
    lengths = sorted(torch.randint(4, 31, (90,), generator=torch.Generator().manual_seed(0)).tolist())
    sizes = sizes_by_length(lengths, size)
    assert sum(sizes) == 90 and max(sizes) <= size and min(sizes) >= 1
    groups = [group.tolist() for group in torch.tensor(lengths).split(sizes)]
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        padding = len(group) * group[-1] - sum(group)
        assert padding <= MAX_PADDING * len(group) * group[-1]
        if following and len(group) < size:  # one more text would add too much padding
            longer = [*group, following[0]]
            assert len(longer) * longer[-1] - sum(longer) > MAX_PADDING * len(longer) * longer[-1]


def test_no_texts_make_no_group_and_equal_lengths_make_full_groups():
    assert sizes_by_length([], 4) == []
    assert sizes_by_length([7] * 10, 4) == [4, 4, 2]


def test_reranking_everything_depends_on_matching_alone(encoded):
    model, _ = encoded
    samples = encode_samples(model, tiny_processor(), tiny_records(7))
    metrics = evaluate_retrieval(model, tiny_processor(), tiny_records(7), k=50)
    scores = matching_scores(model, samples, 50)
    expected = retrieval_metrics(scores, scores, samples.image_of_text)
    reranked = {k.removeprefix("reranked_"): v for k, v in metrics.items() if "reranked" in k}
    assert reranked == {name: value for name, value in expected.items() if "recall" in name}


def test_an_evaluation_under_autocast_compares_in_float32(encoded):
    """Half precision would make many similarities equal, and matching scores have their dtype."""
    model, samples = encoded
    expected = samples.similarity()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(samples.similarity(), expected)
        scores = matching_scores(model, samples, 3)
        metrics = evaluate_retrieval(model, tiny_processor(), tiny_records(7), k=3)
    assert scores.dtype == torch.float32
    assert 0 <= metrics["reranked_recall@1"] <= 100


def test_each_direction_reranks_only_its_own_candidates(encoded):
    """With one candidate each, re-ranking changes nothing at rank 1."""
    model, _ = encoded
    metrics = evaluate_retrieval(model, tiny_processor(), tiny_records(7), k=1)
    assert metrics["reranked_i2t_recall@1"] == metrics["i2t_recall@1"]
    assert metrics["reranked_t2i_recall@1"] == metrics["t2i_recall@1"]


def test_evaluation_leaves_the_mode_as_it_was(encoded):
    model, _ = encoded
    model.train()
    evaluate_retrieval(model, tiny_processor(), tiny_records(3), k=None)
    assert model.training
    model.eval()


def test_ridge_baseline_finds_pictures_that_repeat():
    records = tiny_records(12)
    metrics = ridge_baseline(records, records, strength=0.1)
    assert metrics["recall@1"] > 80


def test_states_in_half_precision_change_little_and_stay_on_the_cpu():
    model, processor = tiny(TCLForImageTextRetrieval)
    whole = evaluate_retrieval(model, processor, tiny_records(7), k=3)
    half = evaluate_retrieval(model, processor, tiny_records(7), k=3, states_dtype=torch.float16)
    similar = [name for name in whole if not name.startswith("reranked")]
    assert {name: half[name] for name in similar} == {name: whole[name] for name in similar}
    assert abs(half["reranked_recall_mean"] - whole["reranked_recall_mean"]) <= 10
