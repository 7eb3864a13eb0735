"""Metrics equal counts by hand; re-ranking equals a plain loop over pairs."""

import pytest
import torch
from helpers import small_patches, tiny, tiny_processor, tiny_records

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.evaluation.metrics import retrieval_metrics, retrieval_ranks
from tcl_hf.evaluation.retrieval import (
    MAX_PADDING,
    NO_RECORD,
    NOT_SCORED,
    RERANK_WEIGHTS,
    can_match,
    candidates,
    chance_recall,
    choose_rerank_weight,
    combined_metrics,
    encode_samples,
    evaluate_retrieval,
    matching_logits,
    matching_scores,
    search_images,
    sizes_by_length,
    tune_rerank_weight,
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


def test_states_in_half_precision_change_little_and_stay_on_the_cpu():
    model, processor = tiny(TCLForImageTextRetrieval)
    whole = evaluate_retrieval(model, processor, tiny_records(7), k=3)
    half = evaluate_retrieval(model, processor, tiny_records(7), k=3, states_dtype=torch.float16)
    similar = [name for name in whole if not name.startswith("reranked")]
    assert {name: half[name] for name in similar} == {name: whole[name] for name in similar}
    assert abs(half["reranked_recall_mean"] - whole["reranked_recall_mean"]) <= 10


# The combined score

# Three images with a text each. Similarity finds one of three pairs, and matching finds another one.
SIMILARITY = torch.tensor([[0.50, 0.40, 0.10], [0.45, 0.40, 0.10], [0.10, 0.42, 0.40]])
LOG_ODDS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
LOGITS = torch.stack([5.0 - LOG_ODDS / 2, 5.0 + LOG_ODDS / 2], dim=-1)  # (3, 3, 2)
ROWS = torch.arange(3)


def test_the_combined_score_equals_a_slow_loop(encoded):
    model, samples = encoded
    similarity, k, weight, temperature = samples.similarity(), 3, 0.7, 0.05
    logits = matching_logits(model, samples, candidates(similarity, k))
    found = combined_metrics(similarity, logits, temperature, samples.image_of_text, k, weight)
    hits = {"i2t": [], "t2i": []}
    for way, number, right in (
        ("i2t", 7, lambda image, text: text // 2 == image),
        ("t2i", 14, lambda text, image: text // 2 == image),
    ):
        table, pairs = (similarity, logits) if way == "i2t" else (similarity.T, logits.transpose(0, 1))
        for query in range(number):
            best = sorted(range(table.shape[1]), key=lambda one: -table[query, one])[:k]
            scores = {
                one: table[query, one].item() / temperature
                + weight * (pairs[query, one, 1].item() - pairs[query, one, 0].item())
                for one in best
            }
            order = sorted(best, key=scores.get, reverse=True)
            wrong = table.shape[1] - (2 if way == "i2t" else 1)  # a query without a right candidate ranks behind all
            hits[way].append(next((place for place, one in enumerate(order) if right(query, one)), wrong))
    for way, places in hits.items():
        for at in (1, 5, 10):
            assert found[f"{way}_recall@{at}"] == pytest.approx(100 * sum(p < at for p in places) / len(places))


def test_weight_0_gives_the_recalls_by_similarity(encoded):
    model, samples = encoded
    similarity = samples.similarity()
    logits = matching_logits(model, samples, candidates(similarity, 50))
    combined = combined_metrics(similarity, logits, 0.07, samples.image_of_text, 50, 0.0)
    expected = retrieval_metrics(similarity, similarity, samples.image_of_text)
    assert combined == {name: value for name, value in expected.items() if "rank" not in name}


def test_a_number_added_to_both_logits_of_a_pair_changes_nothing():
    """The matching loss does not determine it."""
    shift = torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0))
    expected = combined_metrics(SIMILARITY, LOGITS, 0.1, ROWS, 3, 1.0)
    assert combined_metrics(SIMILARITY, LOGITS + 100 * shift, 0.1, ROWS, 3, 1.0) == expected


def test_scores_outside_the_candidates_do_not_count():
    """The right text of image 2 is its second; with k = 1 no weight brings it to the front."""
    assert combined_metrics(SIMILARITY, LOGITS, 0.1, ROWS, 1, 100.0)["i2t_recall@1"] == pytest.approx(100 / 3)
    assert combined_metrics(SIMILARITY, LOGITS, 0.1, ROWS, 2, 100.0)["i2t_recall@1"] == 100


def test_the_weight_with_the_highest_recall_at_1_is_chosen_counted_by_hand():
    """At temperature 0.1, image 1 needs a weight above 0.5 / 2, and image 2 one above 0.2; text 1 needs 0.2 / 2."""
    options = {"similarity": SIMILARITY, "logits": LOGITS, "temperature": 0.1, "image_of_text": ROWS, "k": 3}
    assert choose_rerank_weight(**options) == 0.5
    assert choose_rerank_weight(**options, weights=[4.0, 0.3, 1.0]) == 0.3  # all are perfect: the smallest
    assert choose_rerank_weight(**options, weights=[0.0, 0.22]) == 0.22
    assert choose_rerank_weight(**options | {"logits": LOGITS.flip(-1)}) == 0  # matching is wrong
    assert RERANK_WEIGHTS[0] == 0


def test_combined_recalls_are_reported_where_the_weight_is_set():
    model, processor = tiny(TCLForImageTextRetrieval)
    records = tiny_records(7)
    plain = evaluate_retrieval(model, processor, records, k=3)
    assert not any("combined" in name for name in plain) and "rerank_weight" not in plain
    given = evaluate_retrieval(model, processor, records, k=3, rerank_weight=0.5)
    model.config.rerank_weight = 0.5
    assert evaluate_retrieval(model, processor, records, k=3) == given
    assert {name: given[name] for name in plain} == plain
    assert given["rerank_weight"] == 0.5 and 0 <= given["combined_recall@1"] <= 100
    samples = encode_samples(model, processor, records)
    similarity = samples.similarity()
    logits = matching_logits(model, samples, candidates(similarity, 3))
    expected = combined_metrics(similarity, logits, 0.07, samples.image_of_text, 3, 0.5)
    assert {name.removeprefix("combined_"): v for name, v in given.items() if "combined" in name} == expected


def test_tuning_chooses_among_the_weights_and_leaves_the_mode_as_it_was():
    model, processor = tiny(TCLForImageTextRetrieval)
    model.train()
    assert tune_rerank_weight(model, processor, tiny_records(7), k=3) in RERANK_WEIGHTS
    assert model.training


def no_fusion_layers() -> TCLForImageTextRetrieval:
    model, _ = tiny(TCLForImageTextRetrieval)
    config = small_patches(
        text_config={"vocab_size": 80, "num_hidden_layers": 2, "fusion_layer": 2}, itm_weight=0, mlm_weight=0
    )
    torch.manual_seed(0)
    return type(model)(config).eval()


def test_a_model_without_fusion_layers_is_ranked_by_similarity_alone():
    model = no_fusion_layers()
    metrics = evaluate_retrieval(model, tiny_processor(), tiny_records(7), k=3, rerank_weight=0.5)
    assert not can_match(model.config) and can_match(small_patches()) and not can_match(small_patches(itm_weight=0))
    assert "recall@1" in metrics and not any(name.startswith(("reranked", "combined")) for name in metrics)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_search_finds_the_images_of_a_slow_loop(weight):
    model, processor = tiny(TCLForImageTextRetrieval, rerank_weight=weight)
    records, texts, k = tiny_records(7), ["a red dog", "the big house near a tree", "cat"], 4
    found = search_images(model, processor, records, texts, number=3, k=k)
    assert found.shape == (3, 3)
    samples = encode_samples(model, processor, records, texts=texts)
    assert samples.image_of_text.tolist() == [NO_RECORD] * 3
    for text in range(3):
        similarity = samples.image_embeds @ samples.text_embeds[text]
        best = similarity.argsort(descending=True)[:k].tolist()
        scores = {}
        for image in best:
            one = slice(text, text + 1)
            with torch.no_grad():
                logits = model.match(
                    samples.text_states[one], samples.attention_mask[one], samples.image_states[image : image + 1]
                )[0]
            scores[image] = similarity[image].item() / 0.07 + (weight or 0) * (logits[1] - logits[0]).item()
        assert found[text].tolist() == sorted(best, key=scores.get, reverse=True)[:3]


def test_a_search_works_for_a_model_that_does_not_match_and_for_few_images():
    for model in (no_fusion_layers(), tiny(TCLForImageTextRetrieval, itm_weight=0, rerank_weight=0.5)[0]):
        found = search_images(model, tiny_processor(), tiny_records(3), ["a dog"], number=6, k=2)
        assert sorted(found[0].tolist()) == [0, 1, 2]


def test_images_and_captions_of_which_nothing_can_be_read_are_left_out(caplog):
    """They count neither as misses nor as queries: the metrics are those of the others."""
    model, processor = tiny(TCLForImageTextRetrieval)
    good = tiny_records(6)
    expected = evaluate_retrieval(model, processor, good, k=3)
    bad = [good[0] | {"captions": captions, "image_id": f"bad {n}"} for n, captions in enumerate(([], ["...", "?"]))]
    several = [record | {"captions": ["", "!", *record["captions"], "\ufffd"]} for record in good]
    assert evaluate_retrieval(model, processor, [*bad, *several], k=3) == expected
    assert "2 of 8 images are left out, because they have no caption that can be read: bad 0 (no cap" in caplog.text
