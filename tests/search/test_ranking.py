"""Re-ranking without an index: scores equal those of `match`, and sentence-transformers' evaluator runs on it."""

import os

import numpy as np
import pytest
import torch
from helpers import encoded, photo, tiny

from tcl_hf import TCLForVisualEntailment, TCLModel
from tcl_hf.data.images import open_image
from tcl_hf.models.modeling_tcl import MATCHES, log_odds_of
from tcl_hf.search import SearchError, SearchModel, TCLCrossEncoder, rank
from tcl_hf.search.ranking import default_model

TEXTS = ["a red dog near the house", "the cat"]


@pytest.fixture(scope="module")
def images():
    return [photo(30 + number, 40, seed=number) for number in range(9)]


def logits_of(searcher, images, text):
    """Matching logits by `match`, one image at a time."""
    rows = []
    with torch.no_grad():
        tokens = searcher.processor(text=[text], return_tensors="pt")
        states = searcher.model.tcl.encode_text(**tokens)
        for image in images:
            pixels = searcher.processor(images=[image], return_tensors="pt")["pixel_values"]
            encoded_image = searcher.model.tcl.encode_image(pixels)
            rows.append(searcher.model.match(states, tokens["attention_mask"], encoded_image)[0])
    return torch.stack(rows)


def test_rank_equals_match(searcher, images):
    expected = logits_of(searcher, images, TEXTS[0])
    ranking = rank(TEXTS[0], images, searcher.model, searcher.processor, batch_size=4)
    torch.testing.assert_close(ranking.logits, expected[:, MATCHES], atol=1e-5, rtol=0)
    torch.testing.assert_close(ranking.matching, expected.softmax(-1)[:, MATCHES], atol=1e-5, rtol=0)
    scores = ranking.similarity / searcher.tcl.temperature.detach() + 0.5 * log_odds_of(expected)
    torch.testing.assert_close(ranking.scores, scores, atol=1e-5, rtol=0)
    assert ranking.order == scores.argsort(descending=True).tolist()
    assert rank(TEXTS[0], [], searcher).order == []


def test_texts_are_encoded_once_and_candidates_in_one_batch(searcher, images, monkeypatch):
    calls = {name: [] for name in ("encode_image", "encode_text")}
    for name, sizes in calls.items():
        method = getattr(searcher.tcl, name)
        monkeypatch.setattr(
            searcher.tcl, name, lambda x, *rest, m=method, s=sizes, **kw: (s.append(len(x)), m(x, *rest, **kw))[1]
        )
    rank(TEXTS[0], images, searcher)
    assert calls == {"encode_image": [9], "encode_text": [1]}
    encoder = TCLCrossEncoder(searcher.model, searcher.processor)
    encoder.predict([(text, image) for text in TEXTS for image in images])
    assert calls == {"encode_image": [9, 9], "encode_text": [1, 1, 1]}


def test_the_cross_encoder_scores_pairs_as_match_does(searcher, images, tmp_path):
    encoder = TCLCrossEncoder(searcher.model, searcher.processor)
    images[3].save(tmp_path / "three.png")
    pairs = [(TEXTS[1], images[0]), (TEXTS[0], str(tmp_path / "three.png")), (TEXTS[0], encoded(images[5], "PNG"))]
    expected = [
        logits_of(searcher, [images[i]], t)[0, MATCHES].item() for i, t in ((0, TEXTS[1]), (3, TEXTS[0]), (5, TEXTS[0]))
    ]
    scores = encoder.predict(pairs, batch_size=2)
    assert isinstance(scores, np.ndarray) and scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert encoder.predict(pairs[0]).item() == pytest.approx(expected[0], abs=1e-5)
    assert isinstance(encoder.predict(pairs, convert_to_tensor=True), torch.Tensor)
    ranked = encoder.rank(TEXTS[0], images, top_k=4, return_documents=True)
    logits = logits_of(searcher, images, TEXTS[0])[:, MATCHES]
    order = logits.argsort(descending=True).tolist()[:4]
    assert [one["corpus_id"] for one in ranked] == order and [one["text"] for one in ranked] == [
        images[i] for i in order
    ]
    assert [one["score"] for one in ranked] == pytest.approx(logits[order].tolist(), abs=1e-5)


def test_the_reranking_evaluator_of_sentence_transformers_runs_on_it(searcher, images, tmp_path):
    evaluation = pytest.importorskip(
        "sentence_transformers.cross_encoder.evaluation", reason="sentence-transformers is not installed"
    )
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    samples = [
        {"query": TEXTS[0], "positive": [paths[4]], "negative": [*paths[:4], *paths[5:]]},
        {"query": TEXTS[1], "positive": [paths[1], paths[2]], "negative": [paths[0], *paths[3:]]},
    ]
    evaluator = evaluation.CrossEncoderRerankingEvaluator(samples, at_k=3, write_csv=False)
    metrics = evaluator(TCLCrossEncoder(searcher.model, searcher.processor))
    reciprocal = []
    for sample in samples:
        documents = sample["positive"] + sample["negative"]
        scores = logits_of(searcher, [open_image(path).convert("RGB") for path in documents], sample["query"])[
            :, MATCHES
        ]
        ranks = [
            place
            for place, row in enumerate(scores.argsort(descending=True).tolist()[:3], 1)
            if row < len(sample["positive"])
        ]
        reciprocal.append(1 / ranks[0] if ranks else 0.0)
    assert metrics["mrr@3"] == pytest.approx(sum(reciprocal) / 2)


def test_models_that_cannot_match_or_compare_are_refused(searcher, images, tmp_path):
    bare, processor = tiny(TCLModel)
    with pytest.raises(SearchError, match="TCLModel cannot match, because it has no matching head that was trained"):
        rank(TEXTS[0], images, bare, processor)
    with pytest.raises(SearchError, match=r"needs its processor: give processor=\.\.\."):
        SearchModel(searcher.model)
    with pytest.raises(SearchError, match="is not a TCL model"):
        SearchModel(torch.nn.Linear(2, 2), processor)
    entailment, _ = tiny(TCLForVisualEntailment)
    entailment.save_pretrained(tmp_path / "entailment")
    processor.save_pretrained(tmp_path / "entailment")
    assert not SearchModel(tmp_path / "entailment").can_match  # It has no head for it, and would get a random one.
    with pytest.raises(SearchError, match=r"Image 1 cannot be read: .*a file in none of the formats"):
        rank(TEXTS[0], [images[0], b"no picture"], searcher)


def test_the_default_model_is_the_newest_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SearchError, match="name one with --model, or make one with `tcl-hf demo`"):
        default_model()
    for age, name in enumerate(("openmoji", "openmoji-2", "other")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "config.json", (age, age))
    assert default_model() == os.path.join("runs", "openmoji-2")
