"""Images of annotations are found in tables by their id."""

import pickle

import datasets
import pytest
import torch
from helpers import ANNOTATIONS, PICTURE, png, write_json, write_table

from tcl_hf.data.annotations.entailment import load_entailment
from tcl_hf.data.pairs import DataError, captions_of


@pytest.fixture
def pictures(tmp_path):
    """Parquet files of two splits with the images 1001 and 1002."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, number in (("train", 1001), ("validation", 1002)):
        table = {"image": [{"bytes": png(number), "path": f"{number}.jpg"}], "image_id": [number]}
        write_table(folder / f"{name}.parquet", table, {"image": PICTURE, "image_id": datasets.Value("int64")})
    return str(folder)


def test_images_are_joined_by_id_from_the_files_of_any_split(pictures):
    records = load_entailment(
        [str(ANNOTATIONS / name) for name in ("entailment.jsonl", "snli_ve.jsonl", "albef_ve.json")],
        image_root=pictures,
    )
    assert [record["image_id"] for record in records] == ["1001", "1002", "1001", "1002", "1001"]
    for record in records:
        assert record["image"] == {"bytes": png(int(record["image_id"])), "path": f"{record['image_id']}.jpg"}


def test_joined_records_can_be_selected_batched_and_read_by_workers(pictures):
    records = load_entailment(str(ANNOTATIONS / "entailment.jsonl"), image_root=f"{pictures}/*.parquet")
    assert list(captions_of(records)) == ["The boat is carried .", "The cook sleeps ."]
    assert records[:2]["image"][1]["bytes"] == png(1002)
    assert records.select([1])[0]["image"]["bytes"] == png(1002)
    assert pickle.loads(pickle.dumps(records))[0]["image"]["bytes"] == png(1001)
    loader = torch.utils.data.DataLoader(records, batch_size=2, num_workers=1, collate_fn=list)
    assert [record["image"]["bytes"] for record in next(iter(loader))] == [png(1001), png(1002)]


def test_an_image_that_the_table_lacks_is_named(pictures, tmp_path):
    rows = [{"image_id": "1001", "sentence": "a", "label": "neutral"}]
    rows.append(rows[0] | {"image_id": "1003"})
    with pytest.raises(
        DataError, match=r"rows.json, row 2: its image '1003' is not among the 2 image ids of .*pictures"
    ):
        load_entailment(write_json(tmp_path, rows), image_root=pictures)
    table = write_table(tmp_path / "no_ids.parquet", {"image": [{"bytes": b"", "path": None}]}, {"image": PICTURE})
    with pytest.raises(DataError, match=r"no_ids.parquet has no column image_id among image"):
        load_entailment(write_json(tmp_path, rows), image_root=table)
