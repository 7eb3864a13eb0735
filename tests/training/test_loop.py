"""The loop: it learns, repeats itself, resumes, keeps bad numbers out, and explains its errors."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import losses, small_patches, tiny_processor, tiny_records, tiny_run, training_batch
from torch._dynamo.testing import CompileCounter

from tcl_hf import TCLForPreTraining, TCLForTextAssignment, TCLModel
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import DataError
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.checkpoints import CHECKPOINTS, newest_checkpoint
from tcl_hf.training.guard import NonFiniteError
from tcl_hf.training.log import read_metrics


def test_a_run_leaves_a_model_that_loads_its_processor_and_metrics(reference):
    model = TCLModel.from_pretrained(reference)
    modes = {(reference / name).stat().st_mode for name in ("model.safetensors", "config.json", "metrics.jsonl")}
    assert len(modes) == 1  # Who may read the log may read the weights.
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    tiny_processor().from_pretrained(reference)
    lines = read_metrics(reference / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert set(lines[0]) >= {
        *("loss", "loss_cma", "loss_imc", "loss_lmi", "loss_itm", "loss_mlm"),
        *("learning_rate", "alpha", "temperature", "gradient_norm", "pairs_per_second", "skipped_samples"),
    }
    # Alpha rises over the three steps of the first epoch.
    assert [line["alpha"] for line in lines] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4])


def test_a_run_on_a_cpu_keeps_its_freed_memory(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("tcl_hf.training.engine.keep_freed_memory", lambda: asked.append(True))
    tiny_run(tmp_path, max_steps=1)
    assert asked


def test_two_runs_with_one_seed_have_the_same_losses(reference, tmp_path):
    tiny_run(tmp_path)
    assert losses(tmp_path) == losses(reference)


def test_another_seed_gives_other_losses(reference, tmp_path):
    tiny_run(tmp_path, seed=1)
    assert losses(tmp_path) != losses(reference)


def test_the_number_of_workers_does_not_change_the_losses(reference, tmp_path):
    tiny_run(tmp_path, dataloader_num_workers=2)
    assert losses(tmp_path) == losses(reference)


def test_gradient_checkpointing_does_not_change_the_losses(reference, tmp_path):
    tiny_run(tmp_path, gradient_checkpointing=True)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=1e-5)


@pytest.mark.parametrize("save_steps", [2, 3, 4])
def test_a_resumed_run_goes_on_bit_for_bit(reference, tmp_path, save_steps):
    """The run is stopped within an epoch and at its end; the step that was lost is taken again."""

    class Killed(Exception):
        pass

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        tiny_run(tmp_path, evaluate=kill, save_steps=save_steps, eval_steps=save_steps + 1)
    assert newest_checkpoint(tmp_path).name == f"step-{save_steps:08d}"
    torch.manual_seed(99)
    tiny_run(tmp_path, model=TCLForPreTraining(small_patches()), resume=True)
    assert losses(tmp_path) == losses(reference)
    ours, theirs = (TCLForPreTraining.from_pretrained(folder).state_dict() for folder in (tmp_path, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_of_buckets_goes_on_bit_for_bit(tmp_path):
    """Captions have one to eight words; checkpoints are written within an epoch and at its end."""
    records = tiny_records(26)
    for number, record in enumerate(records):
        record["captions"] = [" ".join(["dog"] * (1 + (number + k) % 8)) for k in range(3)]

    class Seen(TCLPreTrainingCollator):
        def __call__(self, records):
            batch = super().__call__(records)
            lengths.append(batch["attention_mask"].sum(1).tolist())
            return batch

    def run(folder, **options):
        tiny_run(
            tmp_path / folder,
            records,
            collator=Seen(tiny_processor()),
            train_sampling_strategy="group_by_length",
            **options,
        )

    class Killed(Exception):
        pass

    def kill(model):
        raise Killed

    lengths: list[list[int]] = []
    run("whole")
    assert len(lengths) == 12 and all(max(batch) - min(batch) <= 2 for batch in lengths)
    for save_steps in (4, 6):
        folder = f"killed-{save_steps}"
        with pytest.raises(Killed):
            run(folder, evaluate=kill, save_steps=save_steps, eval_steps=save_steps + 1)
        torch.manual_seed(99)
        run(folder, model=TCLForPreTraining(small_patches()), resume=True)
        assert losses(tmp_path / folder) == losses(tmp_path / "whole")


def test_checkpoints_are_whole_or_not_there_and_rotate(tmp_path):
    tiny_run(tmp_path, save_steps=1, save_total_limit=2)
    names = sorted(folder.name for folder in (tmp_path / CHECKPOINTS).iterdir() if folder.suffix != ".tmp")
    assert names == ["step-00000004", "step-00000005"]
    (tmp_path / CHECKPOINTS / "step-00000009.tmp").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-00000005"


def test_the_next_checkpoint_removes_what_a_kill_left(tmp_path):
    unfinished = tmp_path / CHECKPOINTS / "step-00000009.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    tiny_run(tmp_path, save_steps=3)
    assert [folder.name for folder in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000003"]


def test_a_folder_with_checkpoints_of_another_run_is_refused(tmp_path):
    tiny_run(tmp_path, save_steps=4)
    with pytest.raises(TrainingError, match="holds checkpoints of an earlier run"):
        tiny_run(tmp_path, save_steps=4)


def test_a_finished_run_is_replaced_only_if_that_is_asked_for(tmp_path):
    tiny_run(tmp_path, max_steps=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(TrainingError, match=r"holds a model, which a new run would replace: .*--overwrite_output_dir"):
        tiny_run(tmp_path, max_steps=2)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    tiny_run(tmp_path, max_steps=2, overwrite_output_dir=True)
    assert len(losses(tmp_path)) == 2
    tiny_run(tmp_path, max_steps=3, save_steps=2, overwrite_output_dir=True)
    tiny_run(tmp_path, max_steps=1, overwrite_output_dir=True)
    assert newest_checkpoint(tmp_path) is None and len(losses(tmp_path)) == 1


def test_the_best_model_is_whole_until_a_better_one_is_written(tmp_path, monkeypatch):
    """A kill while a model is saved leaves the former one."""
    tiny_run(tmp_path, max_steps=1)
    former = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = TCLForPreTraining.save_pretrained

    def cut(self, folder, **options):
        save(self, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(TCLForPreTraining, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, max_steps=1, learning_rate=1.0, overwrite_output_dir=True)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.keys() == former.keys()
    assert all(left[name] == former[name] for name in former if name != "metrics.jsonl")


def test_resuming_a_run_that_is_done_is_refused(tmp_path):
    tiny_run(tmp_path, save_steps=4)
    with pytest.raises(TrainingError, match="is at step 4, and the run is to end at 3"):
        tiny_run(tmp_path, resume=True, max_steps=3)


def test_the_precision_of_the_launcher_applies_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    tiny_run(tmp_path / "launcher", max_steps=1)
    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    tiny_run(tmp_path / "given", max_steps=1, bf16=True)
    assert losses(tmp_path / "launcher") == losses(tmp_path / "given")


def test_a_compiled_step_is_compiled_once():
    """Numbers that change at each step (alpha, the count of forwards) must not compile the forward again."""
    model = TCLForPreTraining(small_patches()).train()
    counter = CompileCounter()
    forward = torch.compile(model.forward, backend=counter)
    counts = []
    for step in range(4):
        model.update_teacher()
        forward(**training_batch(seed=step), alpha=torch.full((), 0.1 * step)).loss.backward()
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[0]] * 3


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        tiny_run(tmp_path, resume=True)


def test_gradient_accumulation_moves_the_teacher_once_per_optimizer_step(tmp_path, monkeypatch):
    updates = []
    original = TCLForPreTraining.update_teacher
    monkeypatch.setattr(TCLForPreTraining, "update_teacher", lambda self: updates.append(1) or original(self))
    tiny_run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert len(losses(tmp_path)) == 4  # 12 samples: 6 batches, 2 steps an epoch
    assert len(updates) == 4


def test_the_last_step_of_an_epoch_has_the_mean_gradient_of_its_forwards(tmp_path):
    """Of five batches, four are accumulated, and the fifth is a step alone: its gradient is that of its batch."""
    norms = {}
    for number in (1, 4):
        rates = {"learning_rate": 0.0, "min_learning_rate": 0.0, "warmup_learning_rate": 0.0, "warmup_steps": 0}
        options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "max_grad_norm": 0.0}
        folder = tmp_path / str(number)
        tiny_run(folder, tiny_records(10), gradient_accumulation_steps=number, alpha_ramp=False, **options, **rates)
        norms[number] = [line["gradient_norm"] for line in read_metrics(folder / "metrics.jsonl")]
    assert (len(norms[1]), len(norms[4])) == (5, 2)
    assert norms[4][1] == pytest.approx(norms[1][4], rel=1e-5)


def test_evaluation_is_logged_every_eval_steps_and_at_the_end(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(type(model))
        return {"recall@1": 12.5}

    last = tiny_run(tmp_path, evaluate=evaluate, eval_steps=4)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "recall@1" in line]
    assert [line["step"] for line in lines] == [4, 6]
    assert last["recall@1"] == 12.5
    assert seen == [TCLForPreTraining] * 2


def test_mixed_precision_stays_close(reference, tmp_path):
    tiny_run(tmp_path, bf16=True)
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=0.02)


def test_clipping_limits_the_gradient(reference, tmp_path):
    tiny_run(tmp_path, max_grad_norm=0.1)
    assert losses(tmp_path)[0] == losses(reference)[0]
    assert losses(tmp_path) != losses(reference)


def test_a_stream_trains_for_max_steps(tmp_path):
    stream = Dataset.from_list(tiny_records(12)).to_iterable_dataset(num_shards=2)
    tiny_run(tmp_path / "run", pairs=stream, max_steps=5)
    assert len(losses(tmp_path / "run")) == 5
    with pytest.raises(ValueError, match="max_steps"):
        tiny_run(tmp_path, pairs=stream)
    with pytest.raises(
        TrainingError, match="those of a stream are not known: leave out one of train_sampling_strategy and streaming"
    ):
        tiny_run(tmp_path, pairs=stream, max_steps=5, train_sampling_strategy="group_by_length")


def test_a_tensorboard_tracker_receives_the_losses(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    tiny_run(tmp_path, report_to=["tensorboard"], max_steps=1)
    assert list(tmp_path.rglob("events.out.tfevents*"))


# Bad numbers and bad data


class Poisoned(TCLPreTrainingCollator):
    """Puts a NaN into the images of one batch."""

    def __call__(self, records):
        batch = super().__call__(records)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            batch["pixel_values"][0, 0, 0, 0] = math.nan
        return batch


def test_no_nan_reaches_the_weights_and_the_run_names_step_loss_and_checkpoint(tmp_path):
    model = TCLForPreTraining(small_patches())
    with pytest.raises(NonFiniteError, match=r"Step 3: the loss was nan .*step-00000002"):
        tiny_run(tmp_path, model=model, collator=Poisoned(tiny_processor()), save_steps=2, logging_steps=3)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert newest_checkpoint(tmp_path).name == "step-00000002"


def test_bad_samples_are_left_out_and_the_run_goes_on(tmp_path):
    records = tiny_records(12)
    records[3]["image"] = {"bytes": b"broken", "path": None}
    records[7]["captions"] = [""]
    last = tiny_run(tmp_path, records=records, max_bad_share=0.5)
    assert last["skipped_samples"] == 4  # two samples, two epochs
    listed = [json.loads(line)["image_id"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["3", "3", "7", "7"]


def listed(folder) -> list[tuple[str, list[int]]]:
    lines = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    return sorted((line["image_id"], line["visit"]) for line in lines)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_lists_each_bad_visit_once(tmp_path, streaming, num_workers):
    """This includes visits between the checkpoint and the kill, batches prepared ahead, and a line that was cut."""
    records = tiny_records(24)
    for record in records[::4]:
        record["image"] = {"bytes": b"broken", "path": None}
    options = {
        "records": records,
        "per_device_train_batch_size": 6,
        "max_bad_share": 1.0,
        "max_steps": 8,
        "dataloader_num_workers": num_workers,
    }
    if streaming:
        options["pairs"] = Dataset.from_list(records).to_iterable_dataset(num_shards=2)

    def kill(model):
        raise KeyboardInterrupt

    whole = tiny_run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "killed", save_steps=3, eval_steps=5, evaluate=kill, **options)
    with (tmp_path / "killed" / "skipped.jsonl").open("a") as file:
        file.write('{"image_id": "8", "rea')
    resumed = tiny_run(tmp_path / "killed", resume=True, **options)
    assert listed(tmp_path / "killed") == listed(tmp_path / "whole")
    assert len(listed(tmp_path / "whole")) == 12  # six samples in two epochs
    assert resumed["skipped_samples"] == whole["skipped_samples"] == 12


def test_batches_of_bad_samples_alone_are_passed_over(tmp_path):
    records = tiny_records(8)
    for record in records[1:]:
        record["image"] = {"bytes": b"broken", "path": None}
    tiny_run(tmp_path, records=records, per_device_train_batch_size=1, max_steps=3, max_bad_share=1.0)
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("number", [5, 200])
@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_is_all_bad_stops_the_run(tmp_path, number, streaming):
    records = [{"image": {"bytes": b"broken", "path": None}, "captions": ["a"], "image_id": "0"}] * number
    pairs = Dataset.from_list(records)
    with pytest.raises(DataError, match=r"skipped\.jsonl"):
        tiny_run(tmp_path, pairs=pairs.to_iterable_dataset() if streaming else pairs, max_steps=3)


def test_a_stream_with_bad_samples_goes_on(tmp_path):
    records = tiny_records(12)
    for record in records[:7]:
        record["image"] = {"bytes": b"broken", "path": None}
    stream = Dataset.from_list(records).to_iterable_dataset()
    last = tiny_run(tmp_path, pairs=stream, per_device_train_batch_size=2, max_steps=6, max_bad_share=1.0)
    assert last["step"] == 6
    assert last["skipped_samples"] >= 7


def test_a_new_run_starts_a_new_list_of_skipped_samples(tmp_path):
    records = tiny_records(12)
    records[3]["image"] = None
    for _ in range(2):
        tiny_run(tmp_path, records=records, num_train_epochs=1, max_bad_share=1.0, overwrite_output_dir=True)
        assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


def test_the_model_is_saved_before_the_last_evaluation(tmp_path):
    def fail(model):
        raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError):
        tiny_run(tmp_path, evaluate=fail)
    TCLModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"eval_steps": 2}, {"metric_for_best_model": "recall"}], ids=["first", "best"])
def test_a_model_is_saved_before_an_evaluation_that_fails(tmp_path, options):
    weights = {}

    def fail(model):
        weights.update({name: value.clone() for name, value in model.state_dict().items()})
        raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError):
        tiny_run(tmp_path, evaluate=fail, **options)
    saved = TCLForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_the_best_model_stays_if_a_later_evaluation_fails(tmp_path):
    scores, kept = iter([1.0]), {}

    def evaluate(model):
        score = next(scores, None)
        if score is None:
            raise RuntimeError("evaluation failed")
        kept["best"] = model.itm_head.weight.detach().clone()
        return {"accuracy": score}

    with pytest.raises(RuntimeError):
        tiny_run(tmp_path, evaluate=evaluate, eval_steps=2, metric_for_best_model="accuracy")
    assert torch.equal(TCLForPreTraining.from_pretrained(tmp_path).itm_head.weight, kept["best"])


def test_too_much_bad_data_stops_the_run(tmp_path):
    records = tiny_records(120)
    for record in records[::2]:
        record["image"] = {"bytes": b"broken", "path": None}
    with pytest.raises(DataError, match=r"could not be used, more than the share of 0\.1.*skipped\.jsonl"):
        tiny_run(tmp_path, records=records)


def test_no_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        tiny_run(tmp_path, records=[])


def test_less_data_than_a_batch_is_one_batch(tmp_path):
    tiny_run(tmp_path, records=tiny_records(3), per_device_train_batch_size=64, num_train_epochs=2)
    assert len(losses(tmp_path)) == 2


def test_the_model_of_the_best_evaluation_is_kept(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    kept = {}

    def evaluate(model):
        score = next(scores)
        kept[score] = model.itm_head.weight.detach().clone()
        return {"accuracy": score}

    tiny_run(tmp_path, evaluate=evaluate, eval_steps=2, max_steps=6, metric_for_best_model="accuracy")
    saved = TCLForPreTraining.from_pretrained(tmp_path).itm_head.weight
    assert torch.equal(saved, kept[3.0])
    assert not torch.equal(saved, kept[2.0])


def test_keeping_the_best_needs_something_to_measure(tmp_path):
    with pytest.raises(TrainingError, match="needs data to evaluate on"):
        tiny_run(tmp_path, metric_for_best_model="accuracy")
    with pytest.raises(TrainingError, match="no metric 'accuracy' among recall"):
        tiny_run(tmp_path / "other", evaluate=lambda model: {"recall": 1.0}, metric_for_best_model="accuracy")


@pytest.mark.parametrize(("ramp", "expected"), [(True, [0.0, 0.4 / 3, 0.8 / 3, 0.4]), (False, [0.4] * 4)])
def test_alpha_rises_over_the_first_epoch_unless_the_ramp_is_off(tmp_path, ramp, expected):
    tiny_run(tmp_path, max_steps=4, alpha_ramp=ramp)
    assert [line["alpha"] for line in read_metrics(tmp_path / "metrics.jsonl")] == pytest.approx(expected)


def test_a_head_without_teacher_trains(tmp_path):
    torch.manual_seed(0)
    collator = TCLPreTrainingCollator(tiny_processor(), two_views=False, mlm_probability=0)
    tiny_run(tmp_path, model=TCLForTextAssignment(small_patches()), collator=collator)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
