"""Arguments that were changed when a run goes on: nothing happens, a line is logged, or the run is refused."""

import json
import logging
from collections import Counter
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, losses, small_patches, tiny_processor, tiny_records, tiny_run

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.data.fingerprints import fingerprint_of
from tcl_hf.recipes.parsing import FINETUNE, PRETRAIN
from tcl_hf.recipes.phases import _FREE
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.checkpoints import MANIFEST, newest_checkpoint, read_manifest
from tcl_hf.training.identity import (
    FREE,
    LOGGED,
    ON_RESUME,
    REFUSED,
    check_identity,
    fingerprint_of_tokenizer,
    kind_of,
    names_of_kind,
    settings_of,
)

ARGUMENTS = {
    one.name: one
    for kind in (*PRETRAIN.types, *FINETUNE.types)
    for one in fields(kind)
    if one.init and one.name != "task"
} | {"task": None}
HEADING = "| when it was changed | | arguments |\n|---|---|---|\n"


def test_every_argument_is_in_exactly_one_class():
    listed = Counter(name for rule in ON_RESUME for name in rule.names)
    assert listed == Counter(dict.fromkeys(ARGUMENTS, 1))
    assert {rule.kind for rule in ON_RESUME} == {FREE, LOGGED, REFUSED}


def test_the_table_of_the_documentation_is_that_of_the_code():
    words = {FREE: "nothing happens", LOGGED: "a line in the log", REFUSED: "the run is refused"}
    rows = "".join(
        f"| {words[rule.kind]} | {rule.what} | {', '.join(f'`{name}`' for name in rule.names)} |\n"
        for rule in ON_RESUME
    )
    text = (ROOT / "docs" / "training.md").read_text()
    assert HEADING + rows + "\n" in text, HEADING + rows


def test_what_may_change_in_a_finished_phase_is_what_may_change_without_a_word():
    assert names_of_kind(FREE) | {"config"} == _FREE


@pytest.fixture(scope="module")
def before() -> dict:
    """The arguments of a run of each command, as its checkpoint lists them."""
    return settings_of(*(kind() for kind in (*PRETRAIN.types, *FINETUNE.types)))


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_a_changed_argument_is_free_logged_or_refused(before, tmp_path, caplog, name):
    now = before | {name: "another"}
    with caplog.at_level(logging.INFO):
        if kind_of(name) == REFUSED:
            with pytest.raises(TrainingError) as refused:
                check_identity(tmp_path, before, now)
            assert f"{name} was {json.dumps(before[name])[:20]}" in str(refused.value)
            assert 'is now "another"' in str(refused.value) and "start anew from its weights" in str(refused.value)
        else:
            check_identity(tmp_path, before, now)
    assert (f"Resumed with another {name}: " in caplog.text) == (kind_of(name) == LOGGED)
    check_identity(tmp_path, before, dict(before))


def test_the_learning_rate_and_the_length_may_change_and_weights_of_losses_may_not(tmp_path, caplog):
    torch.manual_seed(0)
    tiny_run(tmp_path, save_steps=4)
    with pytest.raises(TrainingError, match=r"config\.itm_weight was 1\.0 and is now 0\.5\."):
        tiny_run(tmp_path, model=TCLForPreTraining(small_patches(itm_weight=0.5)), resume=True)
    with pytest.raises(TrainingError, match=r'config\.class was "TCLForPreTraining" and is now "TCLForImageTextRetr'):
        tiny_run(tmp_path, model=TCLForImageTextRetrieval(small_patches()), resume=True)
    with caplog.at_level(logging.INFO):
        options = {"num_train_epochs": 3, "learning_rate": 5e-4, "dataloader_num_workers": 1, "logging_steps": 2}
        tiny_run(tmp_path, model=TCLForPreTraining(small_patches()), resume=True, **options)
    assert "Resumed with another learning_rate: 0.0005, which was 0.001." in caplog.text
    assert "Resumed with another num_train_epochs: 3, which was 2." in caplog.text
    assert "dataloader_num_workers" not in caplog.text


def test_a_checkpoint_opens_as_the_model_that_it_holds(tmp_path):
    """The sentence of a refusal names it as the start of a new run."""
    model = TCLForPreTraining(small_patches())
    tiny_run(tmp_path, model=model, save_steps=5, max_steps=6)
    checkpoint = newest_checkpoint(tmp_path)
    opened = TCLForPreTraining.from_pretrained(checkpoint)
    fresh = TCLForPreTraining(small_patches())
    tiny_run(tmp_path / "other", model=fresh, max_steps=5)
    for name, value in fresh.state_dict().items():
        if name in opened.state_dict() and not name.startswith("lm_head"):
            assert opened.state_dict()[name].shape == value.shape, name
    assert opened.config.architectures == ["TCLForPreTraining"]


def test_a_checkpoint_of_the_old_format_is_refused_with_the_way_to_its_weights(tmp_path):
    tiny_run(tmp_path, save_steps=4)
    checkpoint = newest_checkpoint(tmp_path)
    manifest = read_manifest(checkpoint)
    (checkpoint / MANIFEST).write_text(json.dumps({name: manifest[name] for name in manifest if name != "format"}))
    with pytest.raises(TrainingError, match=r"written by another version of tcl_hf, as format 1 and not 2: .*--model"):
        tiny_run(tmp_path, resume=True)


def test_random_states_that_cannot_be_used_are_refused_unless_that_is_asked_for(tmp_path, caplog):
    from safetensors.torch import save_file

    tiny_run(tmp_path, save_steps=4)
    checkpoint = newest_checkpoint(tmp_path)
    save_file({}, checkpoint / "random-states-00000.safetensors", metadata={"state": '{"dict": []}'})
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    import hashlib

    content = (checkpoint / "random-states-00000.safetensors").read_bytes()
    manifest["files"]["random-states-00000.safetensors"] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        TrainingError, match=r"random-states-00000.*would not go on bit for bit: resume with --ignore_r"
    ):
        tiny_run(tmp_path, resume=True)
    tiny_run(tmp_path, resume=True, ignore_random_states=True)
    assert "The run goes on with other random numbers (ignore_random_states)" in caplog.text
    assert len(losses(tmp_path)) == 6


# Fingerprints


def test_a_fingerprint_follows_content_and_order_and_not_the_place():
    records = tiny_records(6)
    rows = [record | {"image": {"bytes": None, "path": f"/a/{number}.png"}} for number, record in enumerate(records)]
    moved = [record | {"image": {"bytes": None, "path": f"/b/c/{number}.png"}} for number, record in enumerate(records)]
    first = fingerprint_of(Dataset.from_list(rows))
    assert first == fingerprint_of(Dataset.from_list(moved)) and first["samples"] == 6
    renamed = [*moved[:5], moved[5] | {"image": {"bytes": None, "path": "/b/c/x.png"}}]
    retold = [*rows[:5], rows[5] | {"captions": ["a dog"]}]
    others = [rows[::-1], renamed, retold, rows[:5], [*rows[:5], rows[4]]]
    found = {fingerprint_of(Dataset.from_list(other))["rows"] for other in others} | {first["rows"]}
    assert len(found) == 6


def test_selected_rows_have_the_fingerprint_of_a_table_of_the_same_rows():
    records = tiny_records(7)
    whole = Dataset.from_list(records)
    chosen = [5, 0, 3]
    assert fingerprint_of(whole.select(chosen)) == fingerprint_of(Dataset.from_list([records[row] for row in chosen]))


def test_a_stream_has_the_fingerprint_of_its_files(tmp_path):
    from datasets import load_dataset

    for name in ("a", "b"):
        Dataset.from_list([{"caption": name * 3}]).to_parquet(tmp_path / f"{name}.parquet")

    def stream(*names: str):
        files = [str(tmp_path / f"{name}.parquet") for name in names]
        return load_dataset("parquet", data_files=files, split="train", streaming=True)

    first = fingerprint_of(stream("a", "b"))
    assert first["shards"] == 2 and first == fingerprint_of(stream("a", "b"))
    assert len({fingerprint_of(stream(*names))["files"] for names in (("a", "b"), ("b", "a"), ("a",))}) == 3


def test_a_tokenizer_with_other_numbers_has_another_fingerprint():
    from tcl_hf.data.tokenizer import train_tokenizer

    one = tiny_processor().tokenizer
    assert fingerprint_of_tokenizer(one) == fingerprint_of_tokenizer(tiny_processor().tokenizer)
    other = train_tokenizer(["entirely other words here"] * 2, vocab_size=80)
    assert fingerprint_of_tokenizer(other) != fingerprint_of_tokenizer(one)
