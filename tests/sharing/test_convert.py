"""Converted checkpoints compute the original's outputs and convert back to its tensors; damaged ones are refused."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, ROOT, in_a_process, program, task_inputs, tiny_config
from safetensors.torch import load_file, save_file

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
)
from tcl_hf.sharing.convert import (
    ALBEF,
    check_conversion,
    convert,
    load_original,
    open_saved,
    to_original,
    write_original,
)
from tcl_hf.sharing.original_files import CheckpointError, config_of, read_checkpoint
from tcl_hf.sharing.original_names import original_names

HEADS = {"vision_heads": 4, "text_heads": 4}  # the heads of the golden files are narrower than 64
CLASSES = {
    "pretrain": TCLForPreTraining,
    "retrieval": TCLForImageTextRetrieval,
    "visual_entailment": TCLForVisualEntailment,
    "nlvr": TCLForVisualReasoning,
    "nlvr_pretrain": TCLForTextAssignment,
    "vqa": TCLForQuestionAnswering,
}


def original_file(golden, name: str, path: Path, prefix: str = "", keep=lambda key: True) -> Path:
    """Save a golden file's state in a `.pth`, as the original does."""
    state = {f"{prefix}{key}": value for key, value in golden(name)["state"].items() if keep(key)}
    torch.save({"model": state, "optimizer": {}, "epoch": 3}, path)
    return path


def without_dropout(folder: Path):
    """Open a converted model without the dropout of training that its config has."""
    config = TCLConfig.from_pretrained(folder)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    return type(open_saved(folder)).from_pretrained(folder, config=config)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "module"])
def test_a_checkpoint_converts_and_converts_back(golden, fixed_negatives, name, prefix, tmp_path):
    source = original_file(golden, name, tmp_path / "original.pth", prefix)
    report = convert(source, tmp_path / "ours", **HEADS)
    assert report.used.keys() | report.dropped.keys() == golden(name)["state"].keys()

    model = without_dropout(tmp_path / "ours")
    assert type(model) is CLASSES[name]
    file = golden(name)
    inputs = task_inputs(name, file["in"])
    if "logits" in file["out"]:
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**inputs).logits, file["out"]["logits"], rtol=0, atol=1e-5)
    else:
        model.train().update_teacher()
        if name != "vqa":
            inputs = fixed_negatives(inputs)
        expected = file["out"].get("loss")
        if expected is None:
            expected = sum(file["out"].get(f"loss_{part}", 0) for part in ("ita", "itm", "mlm"))
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=0, atol=1e-5)

    write_original(tmp_path / "ours", tmp_path / "back.pth")
    back, original = read_checkpoint(tmp_path / "back.pth").state_dict, golden(name)["state"]
    assert back.keys() - {"temp"} - {key for key in back if "_proj" in key} <= original.keys() <= back.keys()
    for key, value in original.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


def test_the_file_that_the_original_saved_converts_and_is_checked(tmp_path):
    source = GOLDEN / "pretrain.pth"
    report = convert(source, tmp_path / "ours", **HEADS, **ALBEF)
    assert check_conversion(source, tmp_path / "ours")["tensors"] == 268
    assert set(report.dropped.values()) == {"positions are counted anew"}
    assert report.filled == {"queue.ids": "no image ids: pre-training keeps none"}
    assert report.notes == ["from the file's own settings: momentum=0.995, mlm_probability=0.3"]
    config = TCLConfig.from_pretrained(tmp_path / "ours")
    assert (config.mlm_probability, config.cma_weight, config.lmi_weight) == (0.3, 1.0, 0.0)
    golden_config = tiny_config()
    for part in ("vision_config", "text_config"):
        computed, expected = getattr(config, part).to_dict(), getattr(golden_config, part).to_dict()
        sizes = {key for key in expected if isinstance(expected[key], int) and "token_id" not in key}
        assert {key: computed[key] for key in sizes} == {key: expected[key] for key in sizes}


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        (r"_m.", "no teacher"),
        ("queue", "new: the checkpoint has no queues"),
    ],
)
def test_a_checkpoint_without_teacher_or_queues_converts(golden, left_out, reason, tmp_path):
    def keep(key: str) -> bool:
        return "_m." not in key and "queue" not in key if left_out == "_m." else left_out not in key

    source = original_file(golden, "pretrain", tmp_path / "original.pth", keep=keep)
    model, report = load_original(read_checkpoint(source), **HEADS)
    assert (model.teacher is None) == (left_out == "_m.")
    if left_out == "queue":
        assert set(report.filled.values()) == {reason}
        assert model.queue.image.norm(dim=-1).allclose(torch.ones(65536)) and int(model.queue.cursor) == 0
    back = to_original(model)
    for key, value in read_checkpoint(source).state_dict.items():
        assert torch.equal(back[key], value), key


def test_queues_without_a_teacher_are_dropped_with_a_reason(golden, tmp_path):
    source = original_file(golden, "retrieval", tmp_path / "original.pth", keep=lambda key: "_m." not in key)
    model, report = load_original(read_checkpoint(source), **HEADS)
    assert model.queue is None
    assert report.dropped["idx_queue"] == "queues serve a momentum teacher, which the checkpoint lacks"
    assert "idx_queue" in str(report)


def test_heads_are_64_wide_unless_their_number_is_given(golden):
    state = golden("pretrain")["state"]
    with pytest.raises(
        CheckpointError, match=r"24 wide, which cannot be divided into heads of 64 .* heads with --vision-heads"
    ):
        config_of(state)
    with pytest.raises(CheckpointError, match="32 wide, which cannot be divided into 5 heads: give the number"):
        config_of(state, 4, 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: state.pop("text_encoder_m.bert.encoder.layer.1.output.dense.bias"),
            "lacks 'teacher.tcl.text_mod",
        ),
        (lambda state: state.pop("text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"), "lacks"),
        (lambda state: state.pop("visual_encoder.pos_embed"), "no 'visual_encoder.pos_embed'"),
        (lambda state: state.update(extra=torch.ones(2)), "1 tensors that TCL does not have: extra"),
        (lambda state: state.update(image_queue=torch.ones(16, 19)), "contradict each other: queue"),
        (lambda state: state.update({"vision_proj.bias": torch.ones(15)}), "visual_projection.bias is .15,."),
        (
            lambda state: state["text_encoder.cls.predictions.decoder.bias"].add_(1),
            "copies of one tensor, but they differ",
        ),
        (
            lambda state: state.update({"visual_encoder.pos_embed": torch.ones(1, 9, 24)}),
            "9 positions, .* a square of them",
        ),
        (lambda state: state.update({"vision_proj.weight": torch.ones(16)}), "2 dimensions were expected"),
    ],
)
def test_tensors_that_are_missing_unknown_or_contradict_each_other_are_refused(golden, change, sentence, tmp_path):
    state = golden("pretrain")["state"]
    change(state)
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=sentence):
        convert(tmp_path / "bad.pth", tmp_path / "ours", **HEADS)
    assert not (tmp_path / "ours").exists() and len(list(tmp_path.iterdir())) == 1


class Shell:
    """An object whose pickle runs a command when it is opened."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("layout", ["zip", "old", "pickle 2", "pickle 5"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(layout, tmp_path):
    trace = tmp_path / "it_ran"
    content = {"model": {"a": torch.ones(1)}, "config": Shell(f"touch {trace}")}
    path = tmp_path / "evil.pth"
    if layout.startswith("pickle"):  # torch reads protocol 2 only
        path.write_bytes(pickle.dumps(Shell(f"touch {trace}"), protocol=int(layout[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(CheckpointError, match=r"needs '(posix|nt).system' to be read, .* refused"):
        convert(path, tmp_path / "ours")
    assert not trace.exists() and not (tmp_path / "ours").exists()


def test_a_file_that_needs_another_global_is_refused_by_name(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "args": Path("x")}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"needs 'pathlib\.[\w.]*Path' to be read"):
        read_checkpoint(tmp_path / "released.pth")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds a list instead of a state dict"),
        ({"epoch": 3}, "no weights under 'model' .it has epoch."),
        ({"model": {"visual_encoder.pos_embed": "text"}}, "no weights under 'model'"),
        ({"model": {"bert.embeddings.word_embeddings.weight": torch.ones(2, 2)}}, "has no 'visual_encoder.patch_embed"),
    ],
)
def test_a_foreign_file_is_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=sentence):
        convert(tmp_path / "foreign.pth", tmp_path / "ours")


def test_missing_files_and_existing_targets_are_refused(golden, tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        convert(tmp_path / "none.pth", tmp_path / "ours")
    source = original_file(golden, "pretrain", tmp_path / "original.pth")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(source, tmp_path, **HEADS)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        write_original(tmp_path / "nowhere", tmp_path / "back.pth")
    TCLModel(tiny_config()).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"original has no TCLModel: choose a checkpoint of .*TCLForPreTraining"):
        write_original(tmp_path / "model", tmp_path / "back.pth")
    with pytest.raises(CheckpointError, match="exists already"):
        write_original(tmp_path / "model", source)


@pytest.mark.parametrize(
    ("name", "value"),
    [("pre_layer_norm", True), ("patch_bias", False), ("num_register_tokens", 4), ("use_swiglu_ffn", True)],
)
def test_an_image_encoder_with_parts_that_the_original_lacks_is_refused(name, value, tmp_path):
    model = TCLForPreTraining(tiny_config(vision_config={name: value}))
    with pytest.raises(CheckpointError, match=rf"image encoder cannot hold vision_config\.{name}={value}"):
        to_original(model)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="cannot hold"):
        write_original(tmp_path / "ours", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def write_on_a_full_disk(source: Path, folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    for act in (
        lambda: convert(source, folder / "again", **HEADS),
        lambda: write_original(folder / "ours", folder / "back.pth"),
    ):
        try:
            act()
        except CheckpointError as error:
            print(error)


def test_a_full_disk_leaves_no_part_of_a_file(golden, tmp_path):
    """A limit on the size of files makes writing fail in the middle, as a full disk does."""
    source = original_file(golden, "pretrain", tmp_path / "original.pth")
    convert(source, tmp_path / "ours", **HEADS)
    names = {path.name for path in tmp_path.iterdir()}
    done = in_a_process(write_on_a_full_disk, source, tmp_path)
    assert done.stdout.count("could not be written") == 2 and done.stdout.count("nothing of it was kept") == 2
    assert {path.name for path in tmp_path.iterdir()} == names


def write_damaged(path: Path, target: Path, way: str, draw: random.Random) -> None:
    """Write a damaged copy of a checkpoint."""
    content = bytearray(path.read_bytes())
    if way == "cut":
        target.write_bytes(content[: draw.randrange(len(content))])
        return
    if way == "flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
        return
    is_pth = path.suffix == ".pth"
    state = torch.load(path)["model"] if is_pth else load_file(path)
    name = draw.choice(list(state))
    if way == "renamed":
        letters = list(name)
        letters[draw.randrange(len(letters))] = draw.choice("abcdefgh0123456789._")
        state["".join(letters)] = state.pop(name)
    else:
        value = state[name]
        state[name] = value[None].repeat(2, *[1] * value.ndim) if draw.random() < 0.5 else value.flatten()[:-1]
    if is_pth:
        torch.save({"model": state}, target)
    else:
        save_file(state, target)


def fuzz(number: int, tmp_path: Path, golden) -> None:
    """Damage a `.pth` and our own folder: opening them gives the undamaged tensors or an error of one sentence."""
    draw = random.Random(0)
    pth = GOLDEN / "pretrain.pth"
    convert(pth, tmp_path / "ours", **HEADS)
    # Copied, because a loaded model may read from its file, which is about to change.
    undamaged = {name: value.clone() for name, value in open_saved(tmp_path / "ours").state_dict().items()}
    ours = tmp_path / "ours" / "model.safetensors"
    whole = tmp_path / "whole.safetensors"
    shutil.copy(ours, whole)
    sentences = []
    for trial in range(number):
        way = ("cut", "flipped", "renamed", "reshaped")[trial % 4]
        for source, target in ((pth, tmp_path / "bad.pth"), (whole, ours)):
            write_damaged(source, target, way, draw)
            try:
                if target.suffix == ".pth":
                    tensors = load_original(read_checkpoint(target), **HEADS)[0].state_dict()
                else:
                    tensors = TCLForPreTraining.from_pretrained(target.parent).state_dict()
            except (CheckpointError, OSError) as error:
                sentences.append(str(error))
                continue
            assert tensors.keys() == undamaged.keys()
            for name, value in tensors.items():
                assert torch.equal(value, undamaged[name]), f"{way} {target.name}: {name} was loaded wrongly"
    assert all("\n" not in sentence and len(sentence) < 500 for sentence in sentences)
    assert len(sentences) > 1.8 * number  # a flipped bit may be padding, and a new letter the old one


def test_damaged_files_are_refused(golden, tmp_path):
    fuzz(40, tmp_path, golden)


@pytest.mark.slow
def test_many_damaged_files_are_refused(golden, tmp_path):
    fuzz(500, tmp_path, golden)


def test_the_report_names_files_without_checksums_as_unchecked(golden, tmp_path):
    state = golden("visual_entailment")["state"]
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "original.safetensors")
    for name, reason in (("old.pth", "before PyTorch 1.6"), ("original.safetensors", "safetensors carry no checksums")):
        model, report = load_original(read_checkpoint(tmp_path / name), **HEADS)
        assert reason in str(report)
        assert torch.equal(model.cls_head[2].weight, state["cls_head.2.weight"])


def test_torch_alone_reads_past_a_flipped_bit(tmp_path):
    """This is why checksums are compared. If it fails, torch compares them itself."""
    torch.save({"model": {"a": torch.zeros(10_000)}}, tmp_path / "whole.pth")
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.pth") as archive:
        data = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    content[data.header_offset + data.file_size // 2] ^= 64
    (tmp_path / "flipped.pth").write_bytes(content)
    assert torch.load(tmp_path / "flipped.pth")["model"]["a"].any()
    with pytest.raises(CheckpointError, match="data/0' has another checksum"):
        read_checkpoint(tmp_path / "flipped.pth")


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="holds a 'bert' model and not a TCL"):
        TCLModel.from_pretrained(tmp_path)


def test_the_script_converts_checks_reports_and_writes_a_card(tmp_path):
    source, folder, script = GOLDEN / "pretrain.pth", tmp_path / "ours", ROOT / "scripts/convert_checkpoint.py"

    def run(*arguments) -> subprocess.CompletedProcess:
        return in_a_process(program, script, *arguments)

    heads = ("--vision-heads", 4, "--text-heads", 4)
    done = run(source, folder, *heads, "--tokenizer", "none", "--check", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "used\ttext_proj_m.bias\tteacher.tcl.text_projection.bias" in done.stdout
    assert "TCLForPreTraining: 266 tensors used" in done.stdout
    assert "checked: 268 tensors are equal, bit for bit" in done.stdout
    assert "converted from pretrain.pth of the original code." in (folder / "README.md").read_text()
    done = run(source, tmp_path / "other", *heads, "--tokenizer", tmp_path / "nothing.txt")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: The tokenizer ")
    assert "Traceback" not in done.stderr and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_base_size_converts_within_four_gigabytes(tmp_path):
    """The checkpoint has random tensors with the names and shapes of the paper's."""
    with torch.device("meta"):
        model = TCLForPreTraining(TCLConfig())
    shapes, state = model.state_dict(), {}
    for row in original_names(model.config, "pretrain"):
        first = shapes[row.ours[0]].shape
        shape = [len(row.ours) * first[0], *first[1:]] if first else []
        shape = shape[::-1] if row.transposed else shape
        integer = row.original == "queue_ptr"
        state[row.original] = torch.zeros(shape, dtype=torch.long) if integer else 0.02 * torch.randn(shape)
    for m in ("", "_m"):
        predictions = f"text_encoder{m}.cls.predictions."
        state[f"{predictions}decoder.weight"] = state[f"text_encoder{m}.bert.embeddings.word_embeddings.weight"]
        state[f"{predictions}decoder.bias"] = state[f"{predictions}bias"]
    torch.save({"model": state}, tmp_path / "base.pth")
    command = [sys.executable, "scripts/convert_checkpoint.py", tmp_path / "base.pth", tmp_path / "base"]
    process = subprocess.run([*command, "--tokenizer", "none"], capture_output=True, text=True, check=True)
    assert f"TCLForPreTraining: {len(state)} tensors used" in process.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB
