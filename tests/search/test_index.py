"""The index of pictures: searching it equals brute force, and it follows its folder."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import encoded, photo, png, stirred, tiny, tiny_processor, tiny_records, write_tar
from PIL import Image
from torch.nn import functional as F

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.data.images import open_image
from tcl_hf.models.modeling_tcl import MATCHES, log_odds_of
from tcl_hf.search import ImageIndex, SearchError
from tcl_hf.search.pages import hit_facts, write_page
from tcl_hf.search.storage import About, Storage, schema_of

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


@pytest.mark.slow
def test_search_equals_brute_force_on_a_thousand_pictures(tmp_path, searcher):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(1000):
        photo(34 + number % 50, 30 + number % 7, seed=number).save(folder / f"{number:04d}.jpg", quality=90)
    index = filled(tmp_path, searcher, folder, max_states_bytes=500 * 17 * 24 * 4)  # half of them
    assert index.stats().with_states == 500
    paths = sorted(folder.iterdir())
    for text in (TEXT, "a big cat", "the small blue car"):
        similarity, logits = brute_force(searcher, paths, text)
        nearest = similarity.argsort(descending=True)[:32]
        scores = (similarity / searcher.tcl.temperature.detach() + 0.5 * log_odds_of(logits))[nearest]
        order = nearest[scores.argsort(descending=True)]
        hits = index.search(text, k=32, rerank=32)
        assert [hit.path for hit in hits] == [str(paths[row]) for row in order]
        expected = scores.sort(descending=True).values
        torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), expected, atol=1e-5, rtol=0)


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


def test_a_query_of_text_and_picture_compares_with_the_sum_of_both(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    path = folder / "05.png"
    pixels = searcher.processor(images=[open_image(path).convert("RGB")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        image = searcher.tcl.image_features(searcher.tcl.encode_image(pixels))[0]
    both = image + searcher.encode_text(TEXT).features
    hits = index.search(TEXT, image=path, k=3, rerank=0)
    expected = torch.stack([vector_of(index, hit.path) for hit in hits]) @ (both / both.norm())
    torch.testing.assert_close(torch.tensor([hit.similarity for hit in hits]), expected, atol=1e-5, rtol=0)
    alone = index.search(image=path, k=3)
    assert alone[0].path == str(path) and alone[0].similarity == pytest.approx(1, abs=1e-5)
    assert all(hit.matching is None for hit in alone)


def filled(tmp_path, searcher, folder, **options):
    index = ImageIndex.create(tmp_path / "index", searcher, **options)
    index.sync(folder, progress=False)
    return index


def vector_of(index, image_id):
    return torch.tensor(index._storage.rows(["vector"], f"image_id = '{image_id}'")["vector"][0].as_py())


def rows_of(index):
    """All rows, sorted, with their vectors apart because these may differ by rounding."""
    table = index._storage.rows(index._storage.table.schema.names).sort_by("image_id")
    vectors = torch.tensor(table["vector"].to_pylist())
    states = [torch.frombuffer(bytearray(one), dtype=torch.float32) for one in table["states"].to_pylist() if one]
    facts = table.drop_columns(["vector", "states"]).to_pylist()
    return facts, vectors, states


def test_a_model_without_a_weight_ranks_by_the_logit_of_matching_as_the_paper(tmp_path, folder):
    model, processor = tiny(TCLForImageTextRetrieval)
    index = ImageIndex.create(tmp_path / "index", model, processor)
    index.sync(folder, progress=False)
    paths = sorted(folder.rglob("*.png"))
    _, logits = brute_force(index.model, paths, TEXT)
    order = logits[:, MATCHES].argsort(descending=True).tolist()
    hits = index.search(TEXT, k=5, rerank=12)
    assert [hit.path for hit in hits] == [str(paths[row]) for row in order[:5]]
    assert [hit.score for hit in hits] == pytest.approx(logits[order[:5], MATCHES].tolist(), abs=1e-5)


@pytest.mark.parametrize("kept", [0, 5])
def test_states_that_are_not_kept_are_encoded_again_with_equal_scores(tmp_path, searcher, folder, kept):
    config = searcher.tcl.config.vision_config
    states = 4 * config.hidden_size * (1 + (config.image_size // config.patch_size) ** 2)
    index = filled(tmp_path, searcher, folder, max_states_bytes=kept * states)
    assert index.stats().with_states == kept
    every = ImageIndex.create(tmp_path / "all", searcher)
    every.sync(folder, progress=False)
    assert every.stats().with_states == 12
    for one, other in zip(index.search(TEXT, k=12), every.search(TEXT, k=12), strict=True):
        assert one.path == other.path and one.score == pytest.approx(other.score, abs=1e-5)


def test_a_picture_that_is_gone_or_changed_is_ranked_as_it_was_indexed(tmp_path, searcher, folder, caplog):
    kept = filled(tmp_path, searcher, folder)
    (tmp_path / "second").mkdir()
    unkept = filled(tmp_path / "second", searcher, folder, max_states_bytes=0)
    before = {hit.path: hit.score for hit in kept.search(TEXT, k=12)}
    (folder / "03.png").unlink()
    photo(seed=99).save(folder / "04.png")
    hits = {hit.path: hit for hit in kept.search(TEXT, k=12)}
    assert {path: hit.score for path, hit in hits.items()} == pytest.approx(before, abs=1e-6)
    gone = hits[str(folder / "03.png")]
    assert gone.is_missing and not hits[str(folder / "05.png")].is_missing
    assert gone.image().size == open_image(gone.thumbnail).size == (32, 22)
    scores = {hit.path: hit.score for hit in unkept.search(TEXT, k=12)}
    assert "03.png was changed or deleted since it was indexed: its thumbnail is ranked." in caplog.text
    near = {path: abs(scores[path] - before[path]) for path in before}
    assert near.pop(str(folder / "03.png")) < 1 and near.pop(str(folder / "04.png")) < 1  # as its thumbnails look
    assert max(near.values()) < 1e-5


def test_the_same_content_is_not_encoded_again(tmp_path, searcher, folder, monkeypatch):
    index = filled(tmp_path, searcher, folder)
    shutil.copytree(folder, folder / "copies")
    os.utime(folder / "00.png")
    (folder / "01.png").rename(folder / "copies" / "another.png")

    def fails(*_):
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(searcher, "encode_images", fails)
    assert vars(index.sync(folder, progress=False)) == changes(new=12, moved=1, unchanged=11)
    facts, vectors, _ = rows_of(index)
    by_hash = {}
    for fact, vector in zip(facts, vectors, strict=True):
        assert torch.equal(by_hash.setdefault(fact["hash"], vector), vector)
    assert len(facts) == 24 and len(by_hash) == 12


def changes(**numbers):
    return dict.fromkeys(("new", "changed", "moved", "deleted", "unchanged", "skipped"), 0) | numbers


def test_an_unchanged_folder_is_neither_read_nor_needs_the_model(tmp_path, searcher, folder, monkeypatch):
    filled(tmp_path, searcher, folder)
    monkeypatch.setattr("tcl_hf.search.pictures.Picture.read", lambda self: pytest.fail("a picture was read"))
    index = ImageIndex.open(tmp_path / "index")
    assert vars(index.sync(folder, progress=False)) == changes(unchanged=12)
    assert index._model is None


def test_records_and_images_in_memory_are_added_once(tmp_path, searcher):
    index = ImageIndex.create(tmp_path / "index", searcher)
    records = tiny_records(5)
    assert vars(index.add(records, progress=False)) == changes(new=5)
    assert vars(index.add(records, progress=False)) == changes(unchanged=5)
    images = [photo(seed=1), np.asarray(photo(seed=2)), encoded(photo(seed=3), "JPEG"), 7, photo(seed=1)]
    assert vars(index.add(images, progress=False)) == changes(new=3, skipped=1)
    hit = next(hit for hit in index.search(TEXT, k=8, where="caption IS NOT NULL") if hit.name == "3")
    assert hit.caption == "\n".join(records[3]["captions"]) and hit.path is None and not hit.is_missing
    assert np.array_equal(np.asarray(hit.image()), np.asarray(open_image(records[3]["image"]).convert("RGB")))


def test_sources_of_pairs_are_added_with_their_captions(tmp_path, searcher):
    write_tar(
        tmp_path / "pairs.tar", [(f"{i}.{end}", c) for i in range(4) for end, c in (("png", png(i)), ("txt", b"a dog"))]
    )
    index = ImageIndex.create(tmp_path / "index", searcher)
    assert vars(index.add(tmp_path / "pairs.tar", progress=False)) == changes(new=4)
    assert index.stats().sources == {str(tmp_path / "pairs.tar"): 4}
    assert {hit.caption for hit in index.search(TEXT)} == {"a dog"}


def test_a_folder_has_the_captions_of_its_list(tmp_path, searcher, folder):
    (folder / "captions.csv").write_text("image,caption\n00.png,a red dog\n01.png,a cat\n")
    index = filled(tmp_path, searcher, folder)
    found = {hit.name: hit.caption for hit in index.search(TEXT, k=12, where="caption IS NOT NULL")}
    assert found == {"00.png": "a red dog", "01.png": "a cat"} and len(index) == 12
    (folder / "captions.csv").write_text("image,caption\n00.png,a blue dog\n01.png,a cat\n")
    index.sync(folder, progress=False)
    assert [hit.name for hit in index.search(TEXT, where="caption LIKE '%blue%'")] == ["00.png"]


def test_other_files_beside_pictures_do_not_matter(tmp_path, searcher, folder):
    for name in ("one.csv", "two.csv", "notes.json"):
        (folder / name).write_text("image,caption\n")
    write_tar(folder / "backup.tar", [("note.md", b"")])
    index = filled(tmp_path, searcher, folder)
    assert vars(index.add(folder, progress=False)) == changes(unchanged=12)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", [("0.png", png(0)), ("0.txt", b"a dog")])
    assert vars(index.add(shards, progress=False)) == changes(new=1)


def test_filters_and_k_beyond_the_index(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    assert len(index.search(TEXT, k=100)) == 12
    assert {hit.width for hit in index.search(TEXT, where="width > 48 AND path LIKE '%more%'")} == {50, 51}
    assert index.search(TEXT, where="width > 1000") == []
    with pytest.raises(
        SearchError, match=r"where='nosuch = 3' cannot be used: .*nosuch.* The columns are image_id, path"
    ):
        index.search(TEXT, where="nosuch = 3")
    with pytest.raises(SearchError, match="texts stand in single quotes"):
        index.remove(where="size === 3")
    for k in (0, -1, 2.5, True):
        with pytest.raises(SearchError, match=f"k must be a whole number of at least 1, got {k}"):
            index.search(TEXT, k=k)


def test_queries_that_say_nothing_are_refused_and_long_ones_are_cut(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    with pytest.raises(SearchError, match="The query is empty: give a text, a picture, or both"):
        index.search()
    for text in ("", "  \n", None):
        with pytest.raises(SearchError, match="empty"):
            index.search(text)
    for text in ("?!...", "+++ --- ***", "\";'"):
        with pytest.raises(SearchError, match="has no word that the model reads"):
            index.search(text)
    long = ("a red dog " * 1000)[:10_000]
    assert [hit.path for hit in index.search(long)] == [hit.path for hit in index.search(("a red dog " * 10).strip())]
    with pytest.raises(SearchError, match=r"Image 0 \(.*nothing.png\) cannot be read"):
        index.search(image=folder / "nothing.png")


def test_removing(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    assert index.remove(str(folder / "00.png")) == 1
    assert index.remove([str(folder / "01.png"), "not there"]) == 1
    assert index.remove(folder=folder / "more") == 2
    assert index.remove(where="width = 43") == 1
    assert len(index) == 7
    with pytest.raises(SearchError, match="needs image_ids, a folder or a filter"):
        index.remove()
    assert vars(index.sync(folder, progress=False)) == changes(new=5, unchanged=7)


def test_bad_files_are_listed_and_skipped(tmp_path, searcher, folder, caplog):
    (folder / "text.jpg").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "empty.webp").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "broken.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    Image.new("1", (30_000, 8_000)).save(folder / "bomb.png")
    (folder / "notes.txt").write_text("left out, because its name is not that of a picture")
    index = ImageIndex.create(tmp_path / "index", searcher)
    assert vars(index.sync(folder, progress=False)) == changes(new=12, skipped=6)
    lines = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    reasons = {Path(line["image_id"]).name: line["reason"] for line in lines}
    assert reasons.keys() == {"text.jpg", "cut.png", "empty.webp", "bomb.png", "pipe.jpg", "broken.jpg"}
    assert "DecompressionBomb" in reasons["bomb.png"] and "zero bytes" in reasons["empty.webp"]
    assert "6 pictures or folders cannot be read and are left out (all are listed in" in caplog.text
    for name in reasons:
        (folder / name).unlink()
    assert vars(index.sync(folder, progress=False)) == changes(unchanged=12)
    assert not (tmp_path / "index" / "skipped.jsonl").exists()


def test_a_folder_without_pictures_loses_nothing(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    with pytest.raises(SearchError, match="holds no pictures: name the folder that they are in"):
        index.sync(folder, progress=False)
    with pytest.raises(SearchError, match="is not a folder"):
        index.sync(folder / "nowhere", progress=False)
    assert len(index) == 12


def test_an_index_of_another_model_or_version_is_refused(tmp_path, searcher, folder):
    filled(tmp_path, searcher, folder)
    other, processor = stirred(TCLForImageTextRetrieval), searcher.processor
    with pytest.raises(SearchError, match="holds vectors of other weights: it was made with a model without a name"):
        ImageIndex.open(tmp_path / "index", other, processor)
    smaller = tiny_processor(24)
    with pytest.raises(SearchError, match=r"was made of pictures with 32 x 32 pixels.* reads 24 x 24 pixels"):
        ImageIndex.open(tmp_path / "index", searcher.model, smaller)
    with pytest.raises(SearchError, match="was made with a model that had no name: give the model"):
        ImageIndex.open(tmp_path / "index").search(TEXT)
    with pytest.raises(SearchError, match="holds an index already"):
        ImageIndex.create(tmp_path / "index", searcher)
    with pytest.raises(SearchError, match="holds no index: make one with `tcl-hf index"):
        ImageIndex.open(tmp_path / "nothing")
    about = dataclasses.replace(ImageIndex.open(tmp_path / "index").about, version=2)
    Storage.create(str(tmp_path / "newer"), about)
    with pytest.raises(SearchError, match="is an index of version 2, and this tcl_hf reads version 1"):
        ImageIndex.open(tmp_path / "newer")


def test_models_that_share_the_vision_encoder_share_vectors(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    other, processor = tiny(TCLForImageTextRetrieval)
    torch.nn.init.normal_(other.tcl.text_projection.weight)
    opened = ImageIndex.open(tmp_path / "index", other, processor)
    assert len(opened.search(TEXT)) == 10 and opened.about == index.about


def test_a_second_writer_is_refused_while_searching_works(tmp_path, searcher, folder):
    index = filled(tmp_path, searcher, folder)
    second = ImageIndex.open(tmp_path / "index", searcher)
    with index._storage.writing():
        for write in (lambda: second.sync(folder, progress=False), lambda: second.remove(folder=folder)):
            with pytest.raises(SearchError, match="is being written by another process: wait until it has ended"):
                write()
        assert len(second.search(TEXT)) == 10
    assert vars(second.sync(folder, progress=False)) == changes(unchanged=12)


def test_a_full_disk_keeps_what_was_written(tmp_path, searcher, folder, monkeypatch):
    index = ImageIndex.create(tmp_path / "index", searcher)
    monkeypatch.setattr("tcl_hf.search.encoding.COMMIT_ROWS", 4)
    table, calls = index._storage.table, []

    class FullAfterOne:
        def __getattr__(self, name):
            return getattr(table, name)

        def add(self, rows):
            if calls:
                raise OSError(28, "LanceError(IO): No space left on device (os error 28)")
            calls.append(table.add(rows))

    index._storage.table = FullAfterOne()
    with pytest.raises(SearchError, match="because its disk is full: what was written before stays"):
        index.sync(folder, batch_size=4, progress=False)
    assert 4 <= len(ImageIndex.open(tmp_path / "index")) < 12
    index._storage.table = table
    changed = index.sync(folder, progress=False)
    assert changed.new + changed.unchanged == len(index) == 12


def test_pages_show_the_hits(tmp_path, searcher, folder):
    hits = filled(tmp_path, searcher, folder).search(TEXT, k=3)
    write_page(hits, "dogs & <cats>", tmp_path / "hits.html")
    text = (tmp_path / "hits.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 3 and "dogs &amp; &lt;cats&gt;" in text
    write_page(hits, TEXT, tmp_path / "hits.png")
    assert Image.open(tmp_path / "hits.png").width > 300
    with pytest.raises(SearchError, match=r"let its name end in \.html or \.png"):
        write_page(hits, TEXT, tmp_path / "hits.docx")
    assert hit_facts(hits[0]).keys() == {
        *("image_id", "score", "similarity", "matching", "path", "name", "source", "caption", "width", "height"),
        "is_missing",
    }


def test_heic_pictures_are_read_where_the_extra_is_installed(tmp_path, searcher):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    folder = tmp_path / "heic"
    folder.mkdir()
    heif.from_pillow(photo(64, 48, seed=5)).save(folder / "photo.HEIC", quality=95)
    index = ImageIndex.create(tmp_path / "index", searcher)
    assert vars(index.sync(folder, progress=False)) == changes(new=1)
    (hit,) = index.search(TEXT)
    assert (hit.width, hit.height) == (64, 48)
    difference = np.abs(np.asarray(hit.image()).astype(int) - np.asarray(photo(64, 48, seed=5)).astype(int))
    assert difference.mean() < 8


@pytest.mark.parametrize("dim", [256, 20])
def test_many_rows_are_searched_through_an_approximate_index(tmp_path, monkeypatch, dim):
    monkeypatch.setattr("tcl_hf.search.storage.EXACT_BELOW", 1500)
    about = About("", "", "", dim, (2, 2), "float32", 0)
    index = ImageIndex(Storage.create(str(tmp_path / "index"), about), None)
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(2000, dim, generator=generator), dim=-1)

    def write(rows):
        facts = {"image_id": [str(row) for row in rows], "width": list(rows), "thumbnail": [b""] * len(rows)}
        table = pa.table(facts | {"vector": vectors[list(rows)].tolist()})
        blank = {name: pa.nulls(len(rows), kind) for name, kind in zip(schema.names, schema.types, strict=True)}
        index._storage.write(pa.table(blank | {name: table[name] for name in table.column_names}, schema=schema))
        index._storage.tidy()

    schema = schema_of(about)
    write(range(1000))
    assert index.stats().search == "exact"
    write(range(1000, 1900))
    assert index.stats().search == "approximate"
    write(range(1900, 2000))  # They are found although they are not in the approximate index yet.
    queries = F.normalize(torch.randn(20, dim, generator=generator), dim=-1)
    shares = []
    for query in queries:
        found = [int(row["image_id"]) for row in index._candidates(query, 10, None, with_states=False)]
        shares.append(len({*found} & {*(vectors @ query).topk(10).indices.tolist()}) / 10)
    assert sum(shares) / len(shares) >= 0.95
    some = index._candidates(queries[0], 10, "width >= 1950", with_states=False)
    assert [row["width"] for row in some] == (1950 + (vectors[1950:] @ queries[0]).topk(10).indices).tolist()
