"""Plans against closed forms and against real models."""

import json
import runpy
import struct
import sys

import pytest
import torch
from helpers import ROOT, small_patches, training_batch

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.training.operations import Step, Work, empty_model, run_step, updates
from tcl_hf.training.planning import (
    PlanArguments,
    bytes_on_disk,
    count_parameters,
    describe,
    memory_per_gpu,
    operations_tables,
    throughput,
)


def linear(rows: int, columns: int) -> int:
    """Parameters of a linear layer."""
    return rows * columns + rows


def test_parts_of_the_base_model_by_hand():
    width, inner, words = 768, 3072, 30522
    layer = 4 * linear(width, width) + linear(inner, width) + linear(width, inner) + 2 * 2 * width
    cross = 4 * linear(width, width) + 2 * width
    vision = linear(width, 3 * 16 * 16) + width + 257 * width + 12 * layer + 2 * width
    text = (words + 512 + 2) * width + 2 * width + 6 * layer
    fusion = 6 * (layer + cross)
    shared_space = 2 * linear(256, width) + 1
    heads = linear(2, width) + linear(width, width) + 2 * width + words  # the decoder's weights are the words
    student = vision + text + fusion + shared_space + heads
    assert count_parameters(empty_model(TCLConfig())) == {
        "vision encoder": vision,
        "text encoder": text,
        "fusion encoder": fusion,
        "projections and temperature": shared_space,
        "heads": heads,
        "student": student,
        "teacher": student - 1 - linear(2, width),  # neither temperature nor matching head
    }


def test_parameters_are_those_of_a_real_model():
    real, counted = TCLForPreTraining(small_patches()), count_parameters(empty_model(small_patches()))
    trained = {id(p): p.numel() for p in real.parameters() if p.requires_grad}
    frozen = {id(p): p.numel() for p in real.parameters() if not p.requires_grad}
    assert counted["student"] == sum(trained.values())
    assert counted["teacher"] == sum(frozen.values())


def test_saved_files_are_as_large_as_planned(tmp_path):
    model = TCLForPreTraining(small_patches())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()(**training_batch(), alpha=0.4).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", file[:8])
    assert json.loads(file[8 : 8 + header])["tcl.temperature"]["dtype"] == "F32"
    states = sum(value.nbytes for state in optimizer.state_dict()["state"].values() for value in state.values())
    planned = bytes_on_disk(empty_model(small_patches()))
    assert planned["model"] == len(file) - 8 - header
    assert planned["training checkpoint"] - planned["model"] == states


def test_memory_of_one_gpu_and_of_shares_by_hand():
    model = empty_model(small_patches())
    parts = count_parameters(model)
    student, teacher = 4 * parts["student"], 4 * parts["teacher"]
    queues = 2 * 20 * 16 * 4 + 20 * 8 + 8
    alone = memory_per_gpu(model, 1000, num_gpus=1)
    assert alone["total"] == 4 * student + teacher + queues + 1000  # weights, gradients and two moments; no buckets
    assert memory_per_gpu(model, 1000, num_gpus=8)["total"] == alone["total"] + student
    sharded = memory_per_gpu(model, 1000, num_gpus=8, sharded=True)
    assert [sharded[part] * 8 for part in ("weights", "gradients", "AdamW", "teacher")] == pytest.approx(
        [student, student, 2 * student, teacher], abs=8
    )
    assert sharded["queues"] == queues  # each GPU has the whole queues
    # Gathered are the weights outside the layers of student and teacher, and two of the largest layers (fusion layers).
    size, inner, image = 32, 48, 24
    layer = 4 * linear(size, size) + linear(inner, size) + linear(size, inner) + 4 * size
    cross = 2 * linear(size, size) + 2 * linear(size, image) + 2 * size
    image_layer = 4 * linear(image, image) + linear(96, image) + linear(image, 96) + 4 * image
    in_layers = 2 * 4 * (2 * image_layer + 4 * layer + 2 * cross)
    assert sharded["gathered weights"] == student + teacher - in_layers + 2 * 4 * (layer + cross)


def test_locked_parts_have_one_copy_and_neither_gradients_nor_moments():
    """Weights of the vision encoder and of the lowest text layer, by hand, with sizes from `tiny_config`."""
    size, inner, image = 32, 48, 24
    image_layer = 4 * linear(image, image) + linear(96, image) + linear(image, 96) + 4 * image
    vision = linear(image, 3 * 8 * 8) + (1 + 17) * image + 2 * image_layer + 2 * image
    words = (80 + 40 + 2) * size + 2 * size
    locked = vision + words + 4 * linear(size, size) + linear(inner, size) + linear(size, inner) + 4 * size
    free, model = (
        count_parameters(empty_model(small_patches())),
        empty_model(small_patches(lock_vision=True, lock_text=1)),
    )
    parts = count_parameters(model)
    assert parts == free | {"trained": free["student"] - locked, "teacher": free["teacher"] - locked}
    queues = 2 * 20 * 16 * 4 + 20 * 8 + 8
    memory = memory_per_gpu(model, 1000, num_gpus=8)
    assert memory == {
        "weights": 4 * parts["student"],
        "teacher": 4 * parts["teacher"],
        "gradients": 4 * parts["trained"],
        "AdamW": 8 * parts["trained"],
        "gradient buckets": 4 * parts["trained"],
        "queues": queues,
        "activations": 1000,
        "total": 4 * (parts["student"] + parts["teacher"] + 4 * parts["trained"]) + queues + 1000,
    }
    sharded = memory_per_gpu(model, 1000, num_gpus=8, sharded=True)
    text_layer = 4 * linear(size, size) + linear(inner, size) + linear(size, inner) + 4 * size
    fusion_layer = text_layer + 2 * linear(size, size) + 2 * linear(size, image) + 2 * size
    in_layers = (2 * image_layer + 2 * text_layer + 2 * fusion_layer) + (text_layer + 2 * fusion_layer)
    outside = parts["student"] + parts["teacher"] - in_layers
    assert sharded["gathered weights"] == 4 * (outside + 2 * fusion_layer)


def test_locked_parameters_are_those_of_a_real_model():
    config = small_patches(lock_vision=True, lock_text=True, mlm_weight=0)
    real, counted = TCLForPreTraining(config), count_parameters(empty_model(config))
    assert counted["trained"] == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counted["student"] + counted["teacher"] == sum(p.numel() for p in real.parameters())
    assert counted["teacher"] == sum(p.numel() for p in real.parameters()) - counted["student"]
    saved = {name: p for name, p in real.named_parameters() if not name.startswith("teacher.")}
    assert counted["student"] == sum(p.numel() for p in saved.values())


def test_a_plan_states_the_size_of_kept_states_and_the_time_to_make_them():
    """Of 4 x 4 patches and the class token, 24 numbers wide, for an image and three views."""
    config = small_patches(lock_vision=True)
    layer = 4 * 2 * 17 * 24 * 24 + 2 * 2 * 17 * 24 * 96 + 2 * 2 * 17 * 17 * 24
    flops = 4 * (2 * 16 * 3 * 8 * 8 * 24 + 2 * layer)
    step = run_step(config, 4, 7, from_states=True)
    rate = 1e6 * flops / 3600 / 2  # operations per second, with which two hours are needed for a million images
    plan = PlanArguments(num_gpus=1, num_samples=1_000_000, samples_per_second=rate / (step.flops / 4))
    lines = describe(config, 4, 7, "no", 1, plan, kept_views=3).splitlines()
    assert (
        "A step reads kept states in place of images: 4 views of 17 states of 24 numbers for each image, "
        f"{4 * 17 * 24 * 2 / 1e6:.2f} MB on disk, made by {flops / 1e9:.1f} GFLOP of the locked layers." in lines
    )
    assert f"The states of 1,000,000 images take {4 * 17 * 24 * 2 / 1e3:.2f} GB, and are made in 2 hours." in lines
    assert "kept states" not in describe(config, 4, 7, "no", 1, plan)


def test_throughput_is_measured_or_follows_from_a_stated_utilisation():
    step = Step(0, {"all": Work(forward=200 * 10**12)}, {}, 0)  # 100 samples of 2 TFLOP each
    assert throughput(step, 100, PlanArguments(num_gpus=8, gpu_tflops=300, utilisation=0.5)) == pytest.approx(600)
    assert throughput(step, 100, PlanArguments(samples_per_second=50)) == 50
    assert throughput(step, 100, PlanArguments()) == 0


def test_the_script_prints_a_plan_of_a_recipe(capsys, monkeypatch):
    argv = ["plan.py", "--recipe", "openmoji_scratch", "--num_samples", "86400"]
    monkeypatch.setattr(sys, "argv", [*argv, "--samples_per_second", "60", "--num_gpus", "2", "--operations", "true"])
    runpy.run_path(str(ROOT / "scripts" / "plan.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "| student | " in printed
    assert "60 samples a second (measured), 5.2 million a day." in printed
    assert "60 epochs of 86,400 pairs: 1.0 days." in printed
    assert "| part | forward GFLOP |" in printed and "| activations | GB |" in printed


def test_the_table_adds_up_and_shows_what_bounds_a_part():
    config = TCLConfig()
    plan = PlanArguments(gpu_tflops=1.0, gpu_bandwidth=20.0)  # 50 operations per byte
    counted, parameters = run_step(config, 4, 25), count_parameters(empty_model(config))
    lines = operations_tables(counted, parameters, plan)
    rows = [
        [cell.strip(" <").replace(",", "") for cell in line.split("|")[1:-1]] for line in lines[2 : lines.index("")]
    ]
    *parts, step = rows
    work = counted.work | updates(parameters["student"], parameters["teacher"])
    assert [row[0] for row in parts] == [name.replace(",", "") for name in work]

    def as_shown(number: float):
        return pytest.approx(number, rel=6e-3, abs=1e-3)

    for row, part in zip(parts, work.values(), strict=True):
        *numbers, bound = row[1:]
        forward, backward, share, gigabytes, intensity, milliseconds = (float(n.rstrip("%")) for n in numbers)
        assert (forward, backward, gigabytes) == as_shown((part.forward / 1e9, part.backward / 1e9, part.bytes / 1e9))
        assert share == pytest.approx(100 * part.flops / sum(other.flops for other in work.values()), abs=0.06)
        assert intensity == pytest.approx(part.flops / part.bytes, abs=0.6)
        assert bound == ("arithmetic" if part.flops / part.bytes > 50 else "memory")
        assert milliseconds == as_shown(max(part.flops / 1e9, part.bytes / 2e7))
    assert {row[-1] for row in parts} == {"arithmetic", "memory"}
    for column in (1, 2, 4, 6):
        assert float(step[column]) == pytest.approx(sum(float(row[column]) for row in parts), rel=1e-2)
