"""The teacher's weights as the result of a run: evaluated and saved, while the student trains on with its own."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import losses, small_patches, tiny_run, training_batch

from tcl_hf import TCLForPreTraining, TCLForTextAssignment
from tcl_hf.training.arguments import TCLTrainingArguments, TrainingError
from tcl_hf.training.engine import Engine
from tcl_hf.training.log import read_metrics

STEPS = {"max_steps": 6, "eval_steps": 2}


def new_model(seed: int = 0) -> TCLForPreTraining:
    torch.manual_seed(seed)
    return TCLForPreTraining(small_patches(momentum=0.5))  # so that six steps move the teacher well


@torch.no_grad()
def metrics_of(model) -> dict[str, float]:
    """Numbers that depend on both encoders, on the fusion layers and on the matching head."""
    batch = training_batch()
    output = model.eval()(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    return {"similarity": output.logits_per_image.std().item(), "matching": output.itm_logits.std().item()}


def metrics_by_hand(model) -> dict[str, float]:
    """The metrics of a copy whose student's tensors are replaced one by one."""
    replaced = copy.deepcopy(model)
    students = replaced.state_dict()
    for name, value in replaced.state_dict().items():
        if name.startswith("teacher."):
            students[name.removeprefix("teacher.")].copy_(value)
    return metrics_of(replaced)


def evaluations(folder) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "matching" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with averaged weights, one whose evaluator averages by hand, and one that does not evaluate."""
    folder, options = tmp_path_factory.mktemp("runs"), STEPS
    averaged, by_hand, plain = models = [new_model() for _ in range(3)]
    tiny_run(folder / "averaged", model=averaged, evaluate=metrics_of, average_weights=True, **options)
    tiny_run(folder / "by_hand", model=by_hand, evaluate=metrics_by_hand, **options)
    tiny_run(folder / "plain", model=plain, max_steps=6)
    return folder, models


def test_metrics_are_those_of_a_student_that_was_replaced_by_hand(runs):
    folder, (averaged, *_) = runs
    ours, by_hand = evaluations(folder / "averaged"), evaluations(folder / "by_hand")
    assert ours == by_hand and [line["step"] for line in ours] == [2, 4, 6]
    assert metrics_of(averaged) != metrics_by_hand(averaged)


def test_training_goes_on_as_without_evaluation(runs):
    folder, (averaged, _, plain) = runs
    assert losses(folder / "averaged") == losses(folder / "plain")
    ours, theirs = averaged.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_saved_student_is_the_teacher_and_parts_without_a_copy_stay(runs):
    folder, (_, _, plain) = runs
    saved = TCLForPreTraining.from_pretrained(folder / "averaged").state_dict()
    trained = plain.state_dict()
    copied = {name.removeprefix("teacher.") for name in trained if name.startswith("teacher.")}
    assert {name.split(".")[0] for name in copied} == {"tcl", "lm_head"}
    for name, value in saved.items():
        expected = trained[f"teacher.{name}"] if name in copied else trained[name]
        assert torch.equal(value, expected), name
    assert not torch.equal(saved["tcl.visual_projection.weight"], trained["tcl.visual_projection.weight"])


def test_a_resumed_run_goes_on_bit_for_bit(runs, tmp_path):
    folder, _ = runs
    scores = iter([True, False])

    def evaluate(model):
        if next(scores):
            return metrics_of(model)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        tiny_run(tmp_path, model=new_model(), evaluate=evaluate, average_weights=True, save_steps=3, **STEPS)
    tiny_run(tmp_path, model=new_model(9), evaluate=metrics_of, average_weights=True, resume=True, **STEPS)
    assert losses(tmp_path) == losses(folder / "averaged")
    assert evaluations(tmp_path) == evaluations(folder / "averaged")
    ours, theirs = (TCLForPreTraining.from_pretrained(path).state_dict() for path in (tmp_path, folder / "averaged"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_evaluation_that_fails_leaves_the_student_as_it_was(tmp_path):
    def fail(model):
        raise RuntimeError("evaluation failed")

    model, plain = new_model(), new_model()
    with pytest.raises(RuntimeError, match="evaluation failed"):
        tiny_run(tmp_path / "failed", model=model, evaluate=fail, average_weights=True, max_steps=3)
    tiny_run(tmp_path / "plain", model=plain, max_steps=3)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_model_is_kept_with_the_weights_that_were_measured(tmp_path):
    scores, kept = iter([1.0, 3.0, 2.0]), {}

    def evaluate(model):
        score = next(scores)
        kept[score] = model.tcl.visual_projection.weight.detach().clone()
        return {"accuracy": score}

    best = {"metric_for_best_model": "accuracy", "average_weights": True}
    tiny_run(tmp_path, model=new_model(), evaluate=evaluate, **best, **STEPS)
    saved = TCLForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(saved.tcl.visual_projection.weight, kept[3.0])
    assert torch.equal(saved.teacher.tcl.visual_projection.weight, kept[3.0])
    assert not torch.equal(kept[2.0], kept[3.0])


def test_locked_towers_stay_as_they_are(tmp_path):
    """The teacher has no copy of them."""
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches(momentum=0.5, lock_vision=True, lock_text=1))
    before = {name: value.clone() for name, value in model.tcl.vision_model.state_dict().items()}
    tiny_run(tmp_path, model=model, evaluate=metrics_of, average_weights=True, **STEPS)
    saved = TCLForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in saved.tcl.vision_model.state_dict().items())
    teacher = dict(model.teacher.named_parameters())
    assert torch.equal(saved.tcl.text_model.layers[1].fc1.weight, teacher["tcl.text_model.layers.1.fc1.weight"])
    assert not torch.equal(saved.tcl.text_model.layers[1].fc1.weight, model.tcl.text_model.layers[1].fc1.weight)


def test_a_model_without_teacher_is_refused(tmp_path):
    for model in (TCLForTextAssignment(small_patches()), TCLForPreTraining(small_patches(use_momentum_teacher=False))):
        name = type(model).__name__
        with pytest.raises(TrainingError, match=f"needs a momentum teacher, which this {name} does not have: leave it"):
            tiny_run(tmp_path, model=model, average_weights=True)


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = new_model()
    lora = peft.LoraConfig(target_modules=["visual_projection"], exclude_modules=r"teacher\..*")
    peft.inject_adapter_in_model(lora, model)
    with pytest.raises(TrainingError, match="does not work with adapters"):
        tiny_run(tmp_path, model=model, average_weights=True)


def test_deepspeed_is_refused(tmp_path):
    engine = Engine(TCLTrainingArguments(output_dir=str(tmp_path), average_weights=True))
    engine.accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(TrainingError, match="was not tried under DeepSpeed"):
        engine.prepare(new_model())
