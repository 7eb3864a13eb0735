"""A sample that cannot be used ends nothing: it is skipped, counted and listed, whatever is wrong with it."""

import io
import json
import os
import socket
import tarfile

import pytest
from helpers import png, questions, tiny_processor, write_json
from PIL import Image, ImageFile

from tcl_hf.data.annotations.questions import load_questions
from tcl_hf.data.collators import TCLPreTrainingCollator, TCLTaskCollator
from tcl_hf.data.images import open_image, why_unusable
from tcl_hf.data.inspection import inspect
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.skipped import SkippedSamples
from tcl_hf.data.webdataset import tar_records

HALF = "\ud83d"  # half of a character, which JSON can hold and UTF-8 cannot


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def special_files(folder) -> dict[str, str]:
    """Things at a path that are not regular files, some of which would be waited for."""
    os.mkfifo(folder / "pipe.jpg")
    os.symlink(folder / "pipe.jpg", folder / "link.jpg")
    (folder / "folder.jpg").mkdir()
    place = os.open(folder, os.O_RDONLY)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"/proc/self/fd/{place}/socket.jpg")  # because addresses of sockets have at most 108 bytes
    os.close(place)
    server.close()
    os.symlink("/dev/zero", folder / "device.jpg")
    return {name: str(folder / f"{name}.jpg") for name in ("pipe", "link", "folder", "socket", "device")}


@pytest.mark.parametrize("streaming", [False, True])
def test_pipes_devices_and_folders_are_not_opened_as_images(streaming, tmp_path, processor):
    paths = special_files(tmp_path)
    (tmp_path / "good.png").write_bytes(png(1))
    rows = [{"image": os.path.basename(path), "caption": "a dog"} for path in (*paths.values(), "good.png")]
    pairs = load_pairs(write_json(tmp_path, rows), streaming=streaming)
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    batch = TCLPreTrainingCollator(processor).for_run(skipped)(list(pairs))
    assert len(batch["input_ids"]) == 1 and skipped.count == 5
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in listed] == [os.path.basename(path) for path in paths.values()]
    assert all("not a regular file" in line["reason"] for line in listed)
    if not streaming:
        found = inspect(pairs, processor, progress=False)
        assert set(found.unusable.values()) == {"not a regular file"} and len(found.unusable) == 5


def test_a_decoder_may_raise_anything(monkeypatch, processor):
    def fail(self, *args, **kwargs):
        raise failure

    records = [{"image": {"bytes": png(n), "path": None}, "captions": ["a dog"], "image_id": str(n)} for n in range(2)]
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for failure in (KeyError("CCITT"), IndexError("row"), RuntimeError("decoder"), MemoryError(), ZeroDivisionError()):
        assert type(failure).__name__ in why_unusable(records[0])
        skipped = SkippedSamples()
        assert TCLPreTrainingCollator(processor).for_run(skipped)(records) == {}
        assert skipped.count == 2 and type(failure).__name__ in skipped.last
        assert len(inspect(records, processor, progress=False).unusable) == 2


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "IM"])
def test_formats_that_are_not_stated_are_refused(kind, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind)
    with pytest.raises(OSError, match="none of the formats JPEG, MPO, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
        open_image(file.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats_that_are_stated_are_read(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind)
    assert open_image(file.getvalue()).convert("RGB").getpixel((8, 8))[0] > 240


@pytest.mark.parametrize("streaming", [False, True])
def test_halves_of_characters_spoil_no_other_row(streaming, tmp_path):
    (tmp_path / "good.png").write_bytes(png(1))
    rows = [
        {"image": f"{HALF}.png", "caption": "a dog"},
        {"image": "good.png", "caption": f"a {HALF} dog", "image_id": HALF},
        {"image": {"bytes": HALF, "path": HALF}, "caption": "a dog"},
        {"image": "good.png", "caption": "a cat"},
    ]
    for name in ("rows.json", "rows.jsonl"):
        text = json.dumps(rows) if name.endswith("n") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
        records = list(load_pairs(str(tmp_path / name), streaming=streaming))
        assert [why_unusable(record) is None for record in records] == [False, False, False, True]
        assert records[1]["image_id"] == "\ufffd"


def tar_of(file, members: dict) -> None:
    with tarfile.open(file, "w", errors="surrogateescape") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
def test_names_and_json_in_a_tar_may_be_anything(streaming, tmp_path):
    deep = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    long_number = b'{"caption": ' + b"1" * 5000 + b"}"
    members = {
        "0.jpg": png(0),
        "0.json": deep,
        "1.jpg": png(1),
        "1.json": long_number,
        "caf\udce9.jpg": png(2),  # a name in Latin-1
        "caf\udce9.json": b'{"caption": "a dog"}',
        "3.jpg": png(3),
        "3.json": b'{"caption": "a cat"}',
    }
    tar_of(tmp_path / "a.tar", members)
    records = list(load_pairs(str(tmp_path / "a.tar"), streaming=streaming))
    assert [record["captions"] for record in records] == [[], [], ["a dog"], ["a cat"]]
    assert records[2]["image_id"] == "caf\ufffd"
    assert [why_unusable(record) for record in records] == ["no caption", "no caption", None, None]


@pytest.mark.parametrize("in_order", [True, False])
def test_a_sparse_file_in_a_tar_is_not_blown_up(in_order, tmp_path, monkeypatch):
    monkeypatch.setattr("tcl_hf.data.webdataset._LARGEST_MEMBER", 10_000)
    members = {"0.jpg": b"\0" * 10_001, "0.txt": b"zeros", "1.jpg": png(1), "1.txt": b"a dog"}
    if not in_order:
        members = dict(sorted(members.items(), key=lambda pair: pair[0][1:]))
    tar_of(tmp_path / "a.tar", members)
    first, second = tar_records([str(tmp_path / "a.tar")], ["jpg"], ["txt"])
    assert first["image"] is None and first["captions"] == ["zeros"]
    assert second["image"]["bytes"] == png(1)


def test_halves_of_characters_in_annotations_are_replaced(tmp_path):
    (tmp_path / "0.jpg").write_bytes(png(0))
    rows = [{"image": "0.jpg", "question": f"what {HALF}?", "answer": ["dog"], "question_id": 1, "dataset": "vqa"}]
    (record,) = load_questions(write_json(tmp_path, rows))
    assert record["question"] == "what \ufffd?"


def test_skipped_samples_are_counted_in_the_unit_in_which_they_are_seen(processor):
    """Texts that share an image are samples: a bad text is one of them, and a bad image loses all of them."""
    records = questions()[:3]
    good = {**records[0], "records": [*records, {**records[0], "question": ""}]}
    bad = {**records[0], "records": [{**record, "image": {"bytes": b"x", "path": None}} for record in records]}
    empty = {**records[0], "records": [{**record, "question": ""} for record in records[:2]]}
    skipped = SkippedSamples()
    TCLTaskCollator(processor).for_run(skipped)([good, bad, empty])
    assert (skipped.count, skipped.state_dict()["seen"]) == (1 + 3 + 2, 4 + 3 + 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_in_xmp_counts_as_that_in_exif(kind):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 16))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = io.BytesIO()
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        picture.save(file, kind, pnginfo=info)
    else:
        picture.save(file, kind, xmp=xmp, quality=95)
    opened = open_image(file.getvalue()).convert("RGB")
    assert opened.size == (16, 32)
    assert opened.getpixel((8, 8))[0] > 200 and opened.getpixel((8, 24))[0] < 50  # the left half is now the upper one
    assert open_image(opened).size == (16, 32)  # it is not turned again
