"""Filtering of pairs: scores are those of the model, shares are exact, and a run goes on where it was stopped."""

import json

import numpy as np
import pytest
import torch
from helpers import png, tiny, tiny_records, write_tar

from tcl_hf import TCLModel
from tcl_hf.data.pairs import load_pairs
from tcl_hf.models.modeling_tcl import MATCHES
from tcl_hf.search import SearchError, SearchModel
from tcl_hf.search.filtering import FilterPlan, PairFilter
from tcl_hf.search.ranking import read_rgb

NUMBER = 11


@pytest.fixture
def source(tmp_path):
    files = []
    for number, record in enumerate(tiny_records(NUMBER)):
        content = b"no picture" if number == 4 else record["image"]["bytes"]
        captions = {"captions": record["captions"]}
        files += [(f"{number:03d}.png", content), (f"{number:03d}.json", json.dumps(captions).encode())]
    write_tar(tmp_path / "pairs.tar", files)
    return str(tmp_path / "pairs.tar")


def scores_by_hand(searcher):
    """Similarity and matching of each pair, one by one: {(image, text): (similarity, probability)}."""
    found = {}
    for number, record in enumerate(tiny_records(NUMBER)):
        for text in record["captions"] if number != 4 else ():
            with torch.no_grad():
                pixels = searcher.processor(images=[read_rgb(record["image"])], return_tensors="pt")["pixel_values"]
                tokens = searcher.processor(text=[text], return_tensors="pt")
                states, texts = searcher.tcl.encode_image(pixels), searcher.tcl.encode_text(**tokens)
                features = searcher.tcl.text_features(texts, tokens["attention_mask"])
                similarity = float(searcher.tcl.image_features(states) @ features[0])
                logits = searcher.model.match(texts, tokens["attention_mask"], states)
            found[record["image"]["bytes"], text] = (similarity, float(logits.softmax(-1)[0, MATCHES]))
    return found


def kept_in(output, kind):
    """The pairs in the files of an output, with their images."""
    found = []
    for record in load_pairs(str(output / f"*.{kind}"), streaming=True):
        found += [(record["image"]["bytes"], text) for text in record["captions"]]
    return found


def run(plan, output, searcher):
    return PairFilter(plan, output, searcher, batch_size=3, progress=False).run()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_pairs_above_a_threshold_are_kept_with_their_scores(tmp_path, searcher, source, kind):
    scores = scores_by_hand(searcher)
    limit = float(np.median([similarity for similarity, _ in scores.values()]))
    plan = FilterPlan(source, min_similarity=limit, format=kind, records_per_file=4)
    result = run(plan, tmp_path / "out", searcher)
    expected = [pair for pair, (similarity, _) in scores.items() if similarity >= limit]
    assert 0 < len(expected) < len(scores) == 20
    assert kept_in(tmp_path / "out", kind) == expected
    assert (result.records, result.pairs, result.kept_pairs, result.skipped) == (11, 20, len(expected), 1)
    assert "a file in none of the formats" in (tmp_path / "out" / "skipped.jsonl").read_text()
    if kind == "parquet":
        rows = load_rows(tmp_path / "out")
        for row in rows:
            for text, similarity, matching in zip(row["captions"], row["similarity"], row["matching"], strict=True):
                assert (similarity, matching) == pytest.approx(scores[row["image"]["bytes"], text], abs=1e-5)


def load_rows(folder):
    import pyarrow.parquet as pq

    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("by", ["similarity", "matching"])
def test_a_share_is_exact(tmp_path, searcher, source, by):
    scores = scores_by_hand(searcher)
    column = {"similarity": 0, "matching": 1}[by]
    best = sorted(scores, key=lambda pair: -scores[pair][column])[:6]
    result = run(FilterPlan(source, keep_share=0.3, by=by, records_per_file=4), tmp_path / "out", searcher)
    assert result.kept_pairs == 6 and set(kept_in(tmp_path / "out", "tar")) == set(best)


@pytest.mark.parametrize("options", [{"min_similarity": -1.0}, {"keep_share": 0.5}])
def test_a_run_that_was_stopped_goes_on(tmp_path, searcher, source, options, monkeypatch):
    plan = FilterPlan(source, records_per_file=3, **options)
    whole = run(plan, tmp_path / "whole", searcher)
    encode, calls = searcher.encode_images, []

    def stops(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(searcher, "encode_images", stops)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", searcher)
    assert run(plan, tmp_path / "out", searcher) == whole
    assert sum(calls) == 3 + 10  # The part that was interrupted, three images, is encoded twice, and nothing else.
    names = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert names == [path.name for path in sorted((tmp_path / "whole").glob("*.tar"))]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run(plan, tmp_path / "out", searcher) == whole and len(calls) == 5


def test_plans_that_contradict_themselves_or_the_output_are_refused(tmp_path, searcher, source):
    for options, message in (
        ({}, "Say what to keep"),
        ({"min_similarity": 0.1, "keep_share": 0.5}, "Say what to keep"),
        ({"keep_share": 1.5}, r"keep_share must be above 0 and at most 1, got 1\.5"),
        ({"keep_share": 0.5, "records_per_file": 0}, "records_per_file must be at least 1, got 0"),
    ):
        with pytest.raises(SearchError, match=message):
            run(FilterPlan(source, **options), tmp_path / "out", searcher)
    model, processor = tiny(TCLModel)
    with pytest.raises(SearchError, match="TCLModel cannot match"):
        run(FilterPlan(source, min_matching=0.5), tmp_path / "out", SearchModel(model, processor))
    run(FilterPlan(source, min_similarity=0.0), tmp_path / "out", searcher)
    with pytest.raises(
        SearchError, match=r"output of another run, which differs in min_similarity: name another folder"
    ):
        run(FilterPlan(source, min_similarity=0.5), tmp_path / "out", searcher)


def test_pictures_named_by_paths_are_copied_into_the_files(tmp_path, searcher):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "list.csv").write_text("image,caption\n0.png,a dog\n1.png,a cat\n2.png,?!\n")
    result = run(FilterPlan(str(tmp_path / "list.csv"), min_similarity=-1.0), tmp_path / "out", searcher)
    assert (result.kept_pairs, result.skipped) == (2, 1)
    assert kept_in(tmp_path / "out", "tar") == [(png(0), "a dog"), (png(1), "a cat")]
