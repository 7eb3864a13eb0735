"""The planner's numbers against closed forms and against real models: what it counts is what is there."""

import json
import struct
import sys

import pytest
import torch
from helpers import ROOT, small_patches, training_batch
from torch.utils.flop_counter import FlopCounterMode

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.training.planning import (
    PlanArguments,
    Step,
    bytes_on_disk,
    count_parameters,
    empty_model,
    memory_per_gpu,
    run_step,
    throughput,
    typical_masked,
)

SCRIPTS = ROOT / "scripts"
PAIRS, TOKENS = 4, 7


def linear(rows: int, columns: int) -> int:
    return rows * columns + rows


@pytest.fixture(scope="module")
def step() -> Step:
    return run_step(small_patches(), PAIRS, TOKENS)


def real_step(checkpointing: bool = False, attention: str = "sdpa", patch_dropout: float = 0.0) -> tuple[int, int]:
    """Bytes that a real step keeps for its backward pass, and its operations."""
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches(patch_dropout=patch_dropout)).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = training_batch(PAIRS, TOKENS)
    batch["image_ids"] = torch.arange(PAIRS)
    # As many masked words as the planner supposes: all six of a text of seven tokens would be rarer than one in 500.
    batch["mlm_positions"] = torch.arange(1, 5).repeat(PAIRS, 1)
    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(**batch, alpha=0.4).loss
        kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        if not checkpointing:
            loss.backward()
    return kept_bytes, flops.get_total_flops()


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
    kept_still = {id(p): p.numel() for p in real.parameters() if not p.requires_grad}
    assert counted["student"] == sum(trained.values())
    assert counted["teacher"] == sum(kept_still.values())


def test_activations_and_operations_are_those_of_a_real_step(step):
    activations, _ = real_step()
    assert step.activations == pytest.approx(activations, rel=1e-3)
    assert step.activations == sum(step.activations_by_part.values())
    _, flops = real_step(attention="eager")  # PyTorch's counter passes over the products of the CPU's fused attention
    assert step.flops == flops


def test_activations_of_the_encoders_by_hand():
    """In float32, with dropout in the texts: on a CPU its masks are float32 too. Attention keeps no weights."""
    config = small_patches(text_config={"hidden_dropout_prob": 0.1})
    kept = run_step(config, PAIRS, TOKENS).activations_by_part

    def layer(width: int, inner: int, heads: int = 4) -> int:
        """Floats of a state: two norms' inputs, means and deviations; what attention reads, its queries, keys, values,
        result and a sum for each head; what feed-forward reads, before and after its activation."""
        return 2 * (width + 2) + (width + 3 * width + width + heads) + (width + 2 * inner)

    width, inner, states = 24, 96, PAIRS * 17
    pixels = PAIRS * 3 * 32 * 32
    last_norm = width + 2
    assert kept["image encoder"] == 4 * (pixels + states * (2 * layer(width, inner) + last_norm))
    width, inner, tokens = 32, 48, 2 * PAIRS * TOKENS  # of texts as they are, and with masks
    embeddings = (width + 2) + width  # norm and dropout
    dropout = 2 * width  # of each layer
    padding = 2 * tokens * TOKENS  # what each token may see, made anew by each layer
    ids = tokens + TOKENS + 1  # of words, positions and the type
    floats = tokens * (embeddings + 2 * (layer(width, inner) + dropout)) + padding
    assert kept["text encoder"] == 4 * floats + 8 * ids


def test_patches_that_are_dropped_are_not_counted(step):
    activations, _ = real_step(patch_dropout=0.5)
    _, flops = real_step(attention="eager", patch_dropout=0.5)
    planned = run_step(small_patches(patch_dropout=0.5), PAIRS, TOKENS)
    assert planned.activations == pytest.approx(activations, rel=1e-3)
    assert planned.flops == flops
    # By hand, forward and twice that backward: 8 patches less in the student's image encoder and its attention, and in
    # the keys and values of the fusion layers and what attends to them.
    width, inner, text_width, layers = 24, 96, 32, 2
    encoder = layers * 2 * 8 * (4 * width * width + 2 * width * inner) + layers * 2 * 2 * width * (17**2 - 9**2)
    keys_and_values = layers * 2 * 8 * 2 * width * text_width
    queries = TOKENS + 1 + typical_masked(small_patches(), TOKENS)  # of both fusion layers
    attending = 4 * 2 * 2 * 8 * text_width * queries  # four texts to an image
    assert step.flops - planned.flops == 3 * PAIRS * (encoder + keys_and_values + attending)


def test_checkpointing_keeps_what_a_real_step_keeps_and_one_layer(step):
    activations, _ = real_step(checkpointing=True)
    whole, _ = real_step()
    assert activations < step.activations_checkpointed < whole
    num_layers = 2 + 4  # a layer keeps about as much as another of its kind; fusion layers, half of these, the most
    assert step.activations_checkpointed - activations < 3 * whole / num_layers


def test_half_precision_keeps_less_and_copies_of_the_weights():
    config, large = small_patches(), 64
    full, half = (run_step(config, large, TOKENS, precision).activations for precision in ("no", "bf16"))
    assert 0.4 * full < half < 0.85 * full


def test_saved_files_are_as_large_as_planned(tmp_path):
    model = TCLForPreTraining(small_patches())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()(**training_batch(PAIRS, TOKENS), alpha=0.4).loss.backward()
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
    assert sharded["queues"] == queues  # whole on each
    # Gathered: what lies outside layers, of student and teacher, and two of the largest layers (here of fusion).
    size, inner, image = 32, 48, 24
    layer = 4 * linear(size, size) + linear(inner, size) + linear(size, inner) + 4 * size
    cross = 2 * linear(size, size) + 2 * linear(size, image) + 2 * size
    image_layer = 4 * linear(image, image) + linear(96, image) + linear(image, 96) + 4 * image
    in_layers = 2 * 4 * (2 * image_layer + 4 * layer + 2 * cross)
    assert sharded["gathered weights"] == student + teacher - in_layers + 2 * 4 * (layer + cross)


def test_throughput_is_measured_or_follows_from_a_stated_utilisation():
    step = Step(0, 0, flops=200 * 10**12)  # of 100 samples: 2 TFLOP each
    assert throughput(step, 100, PlanArguments(num_gpus=8, gpu_tflops=300, utilisation=0.5)) == pytest.approx(600)
    assert throughput(step, 100, PlanArguments(samples_per_second=50)) == 50
    assert throughput(step, 100, PlanArguments()) == 0


def test_the_script_prints_a_plan_of_a_recipe(capsys, monkeypatch):
    import runpy

    argv = ["plan.py", "--recipe", "openmoji", "--num_samples", "86400"]
    monkeypatch.setattr(sys, "argv", [*argv, "--samples_per_second", "60", "--num_gpus", "2", "--operations", "true"])
    runpy.run_path(str(SCRIPTS / "plan.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "| student | " in printed
    assert "60 samples a second (measured), 5.2 million a day." in printed
    assert "60 epochs of 86,400 pairs: 1.0 days." in printed
    assert "| part | forward GFLOP |" in printed and "| activations | GB |" in printed
