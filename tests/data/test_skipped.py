"""Bad samples are skipped, counted and listed, across worker processes and interruptions."""

import json

import pytest
import torch
from helpers import png, tiny_processor, write_json

from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import DataError, load_pairs
from tcl_hf.data.sampling import Visit
from tcl_hf.data.skipped import SkippedSamples


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


def test_too_many_bad_samples_stop_the_run():
    skipped = SkippedSamples(max_share=0.1, min_seen=100)
    for number in range(11):
        skipped.add(number, "bad")
    skipped.saw(99)
    skipped.check()  # Fewer than `min_seen` samples are not judged.
    skipped.saw(1)
    with pytest.raises(DataError, match=r"11 of 100 samples could not be used, more than the share of 0\.1"):
        skipped.check()


def test_a_resumed_run_counts_from_its_checkpoint_and_lists_each_visit_once(tmp_path):
    path = tmp_path / "list.jsonl"
    before = SkippedSamples(path)
    before.saw(190)
    for index in range(19):
        before.add("a", "bad", Visit(0, 1, index))
    state = before.state_dict()
    before.add("a", "bad", Visit(0, 1, 19))  # This comes after the checkpoint.
    with path.open("a") as file:
        file.write('{"image_id": "cut by a full d{"image_id": "glued to it", "reason": "bad", "visit": [1, 7]}\n')
        file.write('{"image_id": "cut by a k')
    after = SkippedSamples(path, max_share=0.1)
    after.mend_list()
    after.load_state_dict(state)
    after.check()
    after.add("a", "bad", Visit(0, 1, 18))  # Its batch was prepared ahead, so that the checkpoint counts it already.
    after.check()
    after.add("a", "bad, in other words", Visit(0, 1, 19))
    with pytest.raises(DataError, match="20 of 190 samples"):
        after.check()
    after.add("b", "bad", Visit(0, 1, 2))  # This is another text of the same visit.
    after.add("a", "bad", Visit(0, 2, 2))
    after.add("a", "bad")
    texts = [line for line in path.read_text().splitlines() if "glued" not in line]
    lines = [json.loads(line) for line in texts]
    assert [(line["image_id"], line.get("visit")) for line in lines] == [
        *(("a", [1, index]) for index in range(20)),
        *(("b", [1, 2]), ("a", [2, 2]), ("a", None)),
    ]


def test_bad_samples_are_counted_across_worker_processes(tmp_path):
    skipped = SkippedSamples(tmp_path / "skipped.jsonl")
    collator = TCLPreTrainingCollator(tiny_processor()).for_run(skipped)
    records = [{"image": None, "captions": ["a"], "image_id": n} for n in range(6)]
    loader = torch.utils.data.DataLoader(records, batch_size=2, num_workers=2, collate_fn=collator)
    assert list(loader) == [{}, {}, {}]
    assert skipped.count == 6
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 6
