"""The index of pictures: searching it equals brute force, and it follows its folder."""

import pytest
import torch
from helpers import photo

from tcl_hf.data.images import open_image
from tcl_hf.models.modeling_tcl import MATCHES, log_odds_of
from tcl_hf.search import ImageIndex

pytest.importorskip("lancedb", reason="LanceDB is not installed")

TEXT = "a red dog near the house"


def brute_force(searcher, images, text):
    """Cosine similarities and matching logits of all images with a text, by the model's own methods in one batch."""
    processor, model = searcher.processor, searcher.model
    with torch.no_grad():
        pixels = processor(images=[open_image(image).convert("RGB") for image in images], return_tensors="pt")
        tokens = processor(text=[text], return_tensors="pt")
        states = model.tcl.encode_image(pixels["pixel_values"])
        texts = model.tcl.encode_text(**tokens)
        similarity = model.tcl.image_features(states) @ model.tcl.text_features(texts, tokens["attention_mask"])[0]
        number = len(images)
        logits = model.match(texts.expand(number, -1, -1), tokens["attention_mask"].expand(number, -1), states)
    return similarity, logits


def test_search_equals_brute_force(tmp_path, searcher, folder):
    index = ImageIndex.create(tmp_path / "index", searcher)
    assert vars(index.sync(folder, progress=False))["new"] == 12
    paths = sorted(folder.rglob("*.png"))
    similarity, logits = brute_force(searcher, paths, TEXT)
    hits = index.search(TEXT, k=12, rerank=0)
    order = similarity.argsort(descending=True).tolist()
    assert [hit.path for hit in hits] == [str(paths[row]) for row in order]
    torch.testing.assert_close(torch.tensor([hit.similarity for hit in hits]), similarity[order], atol=1e-5, rtol=0)
    assert all(hit.score == hit.similarity and hit.matching is None for hit in hits)
    scores = similarity / searcher.tcl.temperature + 0.5 * log_odds_of(logits)
    hits = index.search(TEXT, k=12, rerank=12)
    order = scores.argsort(descending=True).tolist()
    assert [hit.path for hit in hits] == [str(paths[row]) for row in order]
    torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), scores[order], atol=1e-5, rtol=0)
    matching = logits.softmax(-1)[order, MATCHES]
    torch.testing.assert_close(torch.tensor([hit.matching for hit in hits]), matching, atol=1e-5, rtol=0)


def test_sync_follows_the_folder(tmp_path, searcher, folder):
    index = ImageIndex.create(tmp_path / "index", searcher)
    index.sync(folder, progress=False)
    (folder / "00.png").rename(folder / "moved.png")
    (folder / "01.png").unlink()
    photo(seed=77).save(folder / "02.png")
    photo(seed=78).save(folder / "new.png")
    (folder / "03.png").touch()
    changes = index.sync(folder, progress=False)
    assert vars(changes) == {"new": 1, "changed": 1, "moved": 1, "deleted": 1, "unchanged": 10 - 1, "skipped": 0}
    again = index.sync(folder, progress=False)
    assert vars(again) == {"new": 0, "changed": 0, "moved": 0, "deleted": 0, "unchanged": 12, "skipped": 0}
    assert index.stats().rows == len(index) == 12
