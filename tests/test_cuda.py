"""On a GPU: the values of the CPU, a step without waiting for the device, and every precision and kernel."""

import contextlib

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import small_patches, tiny_processor, tiny_records, training_batch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcl_hf import TCLConfig, TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.data.collators import TCLPreTrainingCollator, masked_positions
from tcl_hf.data.pairs import load_pairs
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.log import read_metrics
from tcl_hf.training.loop import TrainingRun
from tcl_hf.training.optimization import parameter_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DRAWN = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])


def wide_heads(**fields) -> TCLConfig:
    """A tiny config whose heads are as wide as fused kernels need them."""
    heads = {"hidden_size": 64, "num_attention_heads": 2}
    return small_patches(vision_config=heads, text_config=heads | fields.pop("text_config", {}), **fields)


def batch_on(device: str, config: TCLConfig) -> dict[str, torch.Tensor]:
    batch = training_batch(4, config=config)
    batch["mlm_positions"] = masked_positions(batch["mlm_labels"])
    return {name: value.to(device) for name, value in batch.items()}


@pytest.fixture(autouse=True)
def new_accelerator():
    """Every run chooses its own precision."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def fixed_draws(monkeypatch):
    """The same hard negatives on every device."""

    def fix():
        drawn = iter(DRAWN)
        monkeypatch.setattr(
            "tcl_hf.models.modeling_tcl.sample_hard_negatives",
            lambda logits, excluded: (next(drawn).to(logits.device), torch.ones(4, device=logits.device).bool()),
        )

    return fix


def step(model: TCLForPreTraining, fixed_draws, context=contextlib.nullcontext) -> dict[str, torch.Tensor]:
    """The losses by name, and all gradients, of a step from the model's weights."""
    fixed_draws()
    device = model.tcl.temperature.device.type
    with context():
        output = model.train()(**batch_on(device, model.config), alpha=0.4)
    output.loss.backward()
    found = {name: value.detach().float().cpu() for name, value in output.items() if name.startswith("loss")}
    return found | {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_losses_and_gradients_are_those_of_the_cpu(fixed_draws):
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, fixed_draws)
    model.load_state_dict(state)
    model.zero_grad()
    found = step(model.cuda(), fixed_draws)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-5, name


def test_a_step_never_waits_for_the_device():
    model = TCLForPreTraining(small_patches()).cuda().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-4, fused=True)
    batch = batch_on("cuda", model.config)

    def one_step() -> None:
        model.update_teacher()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, alpha=0.4).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    one_step()  # The first step sets kernels up.
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_is_close_to_float32(fixed_draws):
    torch.manual_seed(0)
    model = TCLForPreTraining(wide_heads()).cuda()
    queue = {name: value.clone() for name, value in model.queue.state_dict().items()}
    expected = step(model, fixed_draws)["loss"]
    model.zero_grad()
    model.queue.load_state_dict(queue)
    found = step(model, fixed_draws, lambda: torch.autocast("cuda", torch.bfloat16))["loss"]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_images_run_through_the_flash_kernel_in_half_precision():
    model = TCLForImageTextRetrieval(wide_heads()).cuda().eval()
    pixels = batch_on("cuda", model.config)["pixel_values"]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        with sdpa_kernel(SDPBackend.MATH):
            expected = model.tcl.get_image_features(pixels).pooler_output
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = model.tcl.get_image_features(pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_flex_attention_trains_as_sdpa(fixed_draws):
    torch.manual_seed(0)
    model = TCLForPreTraining(wide_heads()).cuda()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, fixed_draws)
    model.load_state_dict(state)
    model.zero_grad()
    model.set_attn_implementation("flex_attention")
    found = step(model, fixed_draws)
    for name, value in expected.items():  # The kernel multiplies in tf32.
        assert (found[name] - value).norm() <= 2e-2 * value.norm() + 1e-4, name


def test_a_compiled_forward_gives_the_same_losses(fixed_draws):
    torch.manual_seed(0)
    model = TCLForPreTraining(wide_heads()).cuda().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, fixed_draws)["loss"]
    model.load_state_dict(state)
    model.forward = torch.compile(model.forward)
    fixed_draws()
    found = model(**batch_on("cuda", model.config), alpha=torch.tensor(0.4, device="cuda"))["loss"]
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_padded_texts_match_alike_alone_and_together():
    """The mask of the last layer, which computes [CLS] only, with the kernels of the device."""
    model = TCLForImageTextRetrieval(wide_heads()).cuda().eval()
    batch = batch_on("cuda", model.config)
    with torch.no_grad():
        states = model.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
        images = model.tcl.encode_image(batch["pixel_values"])
        together = model.match(states, batch["attention_mask"], images)
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            alone = model.match(
                states[row : row + 1, :length], batch["attention_mask"][row : row + 1, :length], images[row : row + 1]
            )
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_runs_and_resumes(precision, tmp_path):
    from datasets import Dataset

    processor = tiny_processor()
    Dataset.from_list(
        [{"image": r["image"], "caption": r["captions"][0], "image_id": r["image_id"]} for r in tiny_records(16)]
    ).to_parquet(tmp_path / "train.parquet")
    pairs = load_pairs(str(tmp_path / "train.parquet"))

    def run(folder: str, steps: int, resume: bool = False) -> list[dict[str, float]]:
        torch.manual_seed(0)
        model = TCLForPreTraining(wide_heads(text_config={"vocab_size": len(processor.tokenizer)}))
        fields = {
            "max_steps": steps,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 2,
        }
        args = TCLTrainingArguments(
            str(tmp_path / folder),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            dataloader_num_workers=0,
            learning_rate=1e-3,
            resume=resume,
            **fields,
        )
        TrainingRun(model, pairs, TCLPreTrainingCollator(processor), processor, args).train()
        return read_metrics(tmp_path / folder / "metrics.jsonl")

    whole = run("whole", 6)
    run("cut", 3)
    resumed = run("cut", 6, resume=True)
    assert [line["step"] for line in whole] == [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    assert all(
        line["loss"] == pytest.approx(other["loss"], rel=1e-2) for line, other in zip(whole, resumed, strict=True)
    )
