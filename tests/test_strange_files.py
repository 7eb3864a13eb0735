"""Files that a stranger wrote or a disk damaged: nothing in them is run, and each is refused in a sentence or mended.

The lists of files are those of real runs, so that a file which a run leaves in future is tested by itself.
"""

import contextlib
import hashlib
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_patches, tiny_processor, tiny_records, tiny_run, write_tar

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.cli.command_line import ERRORS
from tcl_hf.data.pairs import load_pairs
from tcl_hf.evaluation.protocol import EvaluationProtocol
from tcl_hf.evaluation.shares import Evaluation
from tcl_hf.recipes import phases
from tcl_hf.recipes.arguments import CheckpointArguments, FinetuningDataArguments
from tcl_hf.recipes.build import candidate_answers, open_model
from tcl_hf.recipes.model_folder import ANSWERS, read_task, write_task
from tcl_hf.recipes.results import write_results
from tcl_hf.sharing.cards import add_results, plain_card
from tcl_hf.sharing.convert import convert
from tcl_hf.training.adapters import add_lora, save_adapted
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.checkpoints import MANIFEST, newest_checkpoint
from tcl_hf.training.log import METRICS, read_metrics
from tcl_hf.training.loop import TrainingRun
from tcl_hf.training.run_folder import tokenizer_of_run

EXECUTED: list[str] = []
PROTOCOL = EvaluationProtocol("retrieval", "flickr8k", "validation", 2, "zero_shot", 32)


def explode(text: str) -> None:
    EXECUTED.append(text)


class Bomb:
    """A thing that runs something when it is unpickled."""

    def __reduce__(self):
        return explode, ("executed",)


def bombs() -> dict[str, bytes]:
    """Pickles that run something when they are opened, in the forms that libraries read."""
    written = {"pickle": pickle.dumps({"state": Bomb()})}
    for name, is_new in (("torch", True), ("torch before 1.6", False)):
        file = io.BytesIO()
        torch.save({"state": Bomb(), "step": 1}, file, _use_new_zipfile_serialization=is_new)
        written[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    return written | {"numpy": file.getvalue()}


BOMBS = bombs()


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sentence_of(use: Callable[[], object]) -> str | None:
    """The error that a command would print, on one line; None if there is none. Other errors pass."""
    try:
        use()
    except ERRORS as error:
        sentence = " ".join(str(error).split())
        assert sentence and "Traceback" not in sentence
        return sentence
    return None


class Prepared(Exception):
    """A run is ready to train."""


@pytest.fixture
def resume(monkeypatch) -> Callable[[Path], str | None]:
    """Resumes a run up to its first step; returns the sentence with which it is refused, or None."""

    def stop(self):
        raise Prepared

    monkeypatch.setattr(TrainingRun, "train_epoch", stop)
    model, records = TCLForPreTraining(small_patches()), tiny_records(12)

    def begin(folder: Path) -> None:
        tokenizer_of_run(TCLTrainingArguments(output_dir=str(folder), resume=True))
        with contextlib.suppress(Prepared):
            tiny_run(folder, records, model, resume=True, max_steps=4, max_bad_share=1.0)

    return lambda folder: sentence_of(lambda: begin(folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run that was killed after its best model and its checkpoint, with all files that runs and evaluations leave."""
    folder = tmp_path_factory.mktemp("saved")
    seen = []

    def measure(model):
        seen.append(model)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"recall": 1.0}

    options = {"save_steps": 2, "eval_steps": 2, "max_steps": 4, "max_bad_share": 1.0}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(
            folder, tiny_records(12), evaluate=measure, metric_for_best_model="recall", **options | {"eval_steps": 1}
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    seen[:] = [None]
    with pytest.raises(KeyboardInterrupt):
        tiny_run(folder, evaluate=measure, overwrite_output_dir=True, **options | {"eval_steps": 3})
    write_task(folder, FinetuningDataArguments(task="question_answering", eval_k=2))
    (folder / ANSWERS).write_text('["red", "green"]\n')
    plain_card("saved", TCLForPreTraining, None).write(folder)
    write_results(folder, Evaluation({"recall@1": 50.0}, [{"image_id": "1", "answer": "red"}]), PROTOCOL)
    add_results(folder, "image-text-retrieval", {"recall@1": 50.0}, PROTOCOL)
    (folder / phases.FINISHED).write_text(json.dumps({"phases": [phases._settings(phase_of(folder))]}))
    (folder / "skipped.jsonl").write_text('{"image_id": "5", "reason": "broken", "visit": [0, 5]}\n')
    return folder


def phase_of(folder: Path) -> phases.Phase:
    arguments = (FinetuningDataArguments(), CheckpointArguments(), TCLTrainingArguments(output_dir=str(folder)))
    phase = phases.Phase(arguments, place="recipe.yaml: phases[1]: ")
    phase.run = [phase]
    return phase


def rehash(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as an attacker can."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


class Folder:
    """A copy of a folder in which files are replaced, and which is then as it was again."""

    def __init__(self, original: Path, copy: Path):
        self.path, self.original = copy, original
        self.restore()

    def restore(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.original, self.path)


def test_the_bombs_go_off_where_pickles_are_read(tmp_path):
    for name, content in BOMBS.items():
        (tmp_path / "bomb").write_bytes(content)
        if name == "numpy":
            np.load(tmp_path / "bomb", allow_pickle=True)
        elif name == "pickle":
            pickle.loads(content)
        else:
            torch.load(tmp_path / "bomb", weights_only=False)
        assert EXECUTED == ["executed"], name
        EXECUTED.clear()


def test_no_file_of_a_checkpoint_is_executed(saved, tmp_path, resume):
    copy = Folder(saved, tmp_path / "run")
    assert resume(copy.path) is None
    checkpoint = newest_checkpoint(copy.path)
    names = files_below(checkpoint)
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert {name for name in names if name.endswith(".safetensors")} == {
        "model.safetensors",
        "optimizer.safetensors",
        "random-states-00000.safetensors",
        "run.safetensors",
    }
    for name in names:
        for kind, content in BOMBS.items():
            for is_rehashed in (False, True) if kind == "torch" and name != MANIFEST else (name != MANIFEST,):
                copy.restore()
                (checkpoint / name).write_bytes(content)
                if is_rehashed:
                    rehash(checkpoint)
                sentence = resume(copy.path)
                assert not EXECUTED, (name, kind, is_rehashed)
                if name.endswith(".safetensors") or not is_rehashed:
                    place = checkpoint / name if is_rehashed else checkpoint.parent
                    assert sentence and str(place) in sentence, (name, kind, sentence)


def test_no_file_of_a_model_folder_is_executed(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    processor = tiny_processor()
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    model = TCLForImageTextRetrieval(small_patches(text_config=ids))
    for name in ("model", "adapters"):
        if name == "adapters":
            model = TCLForImageTextRetrieval.from_pretrained(tmp_path / "model")
            add_lora(model, TCLTrainingArguments(lora={"r": 2}, lora_save="adapter"))
            save_adapted(model, tmp_path / name, "adapter")
        else:
            model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        (tmp_path / name / "SHA256SUMS").unlink()  # Else it alone would refuse other weights.
        for file in [*files_below(tmp_path / name), "pytorch_model.bin", "adapter_model.bin", "code.py"]:
            for kind in BOMBS if file.endswith((".bin", ".safetensors")) else ("pickle",):
                copy = Folder(tmp_path / name, tmp_path / "copy")
                (copy.path / file).write_bytes(BOMBS[kind])
                if file.endswith(".bin"):
                    for weights in copy.path.glob("*.safetensors"):
                        weights.unlink()
                arguments = CheckpointArguments(model=str(copy.path))
                sentence = sentence_of(lambda: open_model(arguments, TCLForImageTextRetrieval))  # noqa: B023
                assert not EXECUTED, (file, kind)
                assert sentence or file in ("code.py", "chat_template.jinja"), (file, kind)


def test_no_file_to_convert_is_executed(tmp_path):
    for kind, content in BOMBS.items():
        (tmp_path / "TCL.pth").write_bytes(content)
        sentence = sentence_of(lambda: convert(tmp_path / "TCL.pth", tmp_path / "out"))
        assert not EXECUTED and sentence, kind


def test_no_file_of_a_data_folder_is_executed(tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    rows = []
    for number, record in enumerate(tiny_records(3)):
        (good / f"{number}.png").write_bytes(record["image"]["bytes"])
        rows.append({"image": f"{number}.png", "caption": record["captions"][0]})
    (good / "rows.json").write_text(json.dumps(rows))
    (good / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": row["image"], "text": row["caption"]}) + "\n" for row in rows)
    )
    files = [(f"{n}.{kind}", content) for n in range(2) for kind, content in (("png", b"x"), ("txt", b"a dog"))]
    write_tar(good / "shard.tar", files)
    load_pairs(str(good / "rows.json"), image_root=str(good)).to_parquet(good / "rows.parquet")

    def read(folder: Path) -> None:
        for source in ("rows.json", "rows.parquet", "shard.tar", "metadata.jsonl", ""):
            sentence_of(lambda: list(load_pairs(str(folder / source), image_root=str(folder))))  # noqa: B023

    read(good)
    for name in [*files_below(good), "good.py", "dataset_infos.json", "README.md", "x.pkl", "x.pickle", "x.pth"]:
        for kind in ("pickle", "torch"):
            copy = Folder(good, tmp_path / f"copy-{name}-{kind}")
            (copy.path / name).write_bytes(BOMBS[kind])
            read(copy.path)
            assert not EXECUTED, (name, kind)
    member = tmp_path / "member"
    for ending in ("pickle", "pkl", "pth", "pyd", "npy", "npz", "json", "txt", "png"):
        for kind in ("pickle", "numpy"):
            member.mkdir(exist_ok=True)
            write_tar(member / f"{ending}.tar", [("0.png", b"x"), ("0.txt", b"a dog"), (f"0.{ending}", BOMBS[kind])])
            source = str(member / f"{ending}.tar")
            sentence_of(lambda: list(load_pairs(source, split="train", streaming=True)))  # noqa: B023
            assert not EXECUTED, (ending, kind)


FOREIGN = [
    *(b"", b"\n", b"\0" * 300, b"null", b"true", b"7", b"[]", b"{}", b'""', b"[[1]]", b'{"step": 2}', b"\xff\xfe{}"),
    *(b"[" * 5_000, b'{"a":' * 5_000, b'{"files": {"../x": [1, "y"]}}', b'{"task": ["x"], "data": 1}'),
    *(
        b'{"step": "2"}\n{"step": null}\n[1]\n{"loss": 1}\n',
        b'{"image_id": 1, "visit": 3}\n5\n',
        b'{"visit": [[1], 2]}',
    ),
    *(
        b"1" * 5_000,
        b'{"step": 1e999, "num_processes": 1}',
        b"---\na: [\n---\n",
        b"---\nmodel-index: 3\n---\n",
        b"---\n- 1\n---\n",
    ),
    *(
        b'{"phases": [1]}',
        b'{"phases": {"a": 1}}',
        b'{"model_type": "bert"}',
        b'{"model_type": []}',
        b'{"tokenizer_class": 3}',
    ),
]


def damaged(content: bytes, foreign: list[bytes], draw: random.Random) -> bytes:
    """A file that was cut, in which bytes were flipped, or in whose place another one is."""
    kind = draw.choice(("cut", "flipped", "foreign")) if content else "foreign"
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "foreign":
        return draw.choice(foreign)
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 40))):
        changed[draw.randrange(min(len(changed), draw.choice((64, 2_000, 10**9))))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def evaluate_beside(folder: Path) -> None:
    """Read and write all that an evaluation and a report read and write in the folder of a model."""
    read_task(str(folder), names_data=False)
    candidate_answers(FinetuningDataArguments(task="question_answering"), None, str(folder))
    add_results(folder, "image-text-retrieval", {"recall@1": 60.0}, PROTOCOL)
    write_results(folder, Evaluation({"recall@1": 60.0}), PROTOCOL)
    open_model(CheckpointArguments(model=str(folder)), TCLForImageTextRetrieval)


def uses(folder: Path, resume: Callable[[Path], str | None]) -> Iterator[str | None]:
    """The sentences with which each use of a run's folder is refused; None for one that is not."""
    yield sentence_of(lambda: evaluate_beside(folder))
    yield sentence_of(lambda: phases._check_finished([phase_of(folder)]))
    yield resume(folder)


def fuzz(saved: Path, folder: Path, resume: Callable[[Path], str | None], number: int, seed: int) -> dict[str, int]:
    """Damage a file, use the folder in every way, and look at what is left; return how often it was refused."""
    draw = random.Random(seed)
    originals = {name: (saved / name).read_bytes() for name in files_below(saved)}
    foreign = [*FOREIGN, *originals.values()]
    whole_lines = {line for line in originals[METRICS].splitlines() if json.loads(line)["step"] <= 2}
    found, failures = {"refused": 0, "went on": 0}, []
    copy = Folder(saved, folder)
    for attempt in range(number):
        name = draw.choice(sorted(originals))
        content = damaged(originals[name], foreign, draw)
        (folder / name).write_bytes(content)
        if name.startswith("checkpoints") and not name.endswith(MANIFEST) and draw.random() < 0.7:
            rehash(newest_checkpoint(folder))
        case = (seed, attempt, name, content[:80])
        left = set(content.splitlines()) if name == METRICS else whole_lines
        try:
            sentences = list(uses(folder, resume))
        except Exception as error:
            failures.append((case, f"{type(error).__name__}: {error}"[:300]))
            copy.restore()
            continue
        found["refused" if any(sentences) else "went on"] += 1
        lines = (folder / METRICS).read_bytes().splitlines()
        assert (
            whole_lines & left <= {json.dumps(json.loads(line)).encode() for line in lines if line} or sentences[2]
        ), case
        # What cannot be made again is never removed.
        kept = [one for one in originals if one.endswith(".safetensors") and one != name]
        assert all((folder / one).read_bytes() == originals[one] for one in kept), case
        for one in {*originals, *files_below(folder)}:
            if one not in originals:
                (folder / one).unlink()
            elif not (folder / one).is_file() or (folder / one).read_bytes() != originals[one]:
                copy.restore()
                break
    assert not failures, "\n".join(map(str, failures))
    return found


def test_damaged_files_of_a_run_are_refused_in_a_sentence_or_passed_over(saved, tmp_path, resume):
    found = fuzz(saved, tmp_path / "run", resume, 60, seed=0)
    assert found["refused"] > 5 and found["went on"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_two_thousand_damaged_files_of_a_run(saved, tmp_path, resume, seed):
    found = fuzz(saved, tmp_path / "run", resume, 250, seed)
    assert sum(found.values()) == 250 and min(found.values()) > 25


def test_cut_lines_of_the_log_are_passed_over_and_no_whole_line_is_lost(saved, tmp_path, resume, caplog):
    copy = Folder(saved, tmp_path / "run")
    log = copy.path / METRICS
    lines = log.read_bytes().splitlines(keepends=True)
    assert [line["step"] for line in read_metrics(log)] == [1, 2, 3]
    log.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[1] + lines[2][:-5])
    assert resume(copy.path) is None
    assert f"{log}: 2 damaged lines are passed over, the first is line 2" in caplog.text
    assert log.read_bytes() == lines[0] + lines[1]
