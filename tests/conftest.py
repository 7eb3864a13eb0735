"""Tiny models, inputs and golden files for all tests."""

import os
import shutil
import tempfile

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # for the time of the tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning thread pools on shared cores are far slower than one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tcl_hf import TCLConfig, TCLImageProcessorPil, TCLProcessor
from tcl_hf.convert import from_original
from tcl_hf.data import train_tokenizer

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def remove_cache():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def tiny_config(**fields) -> TCLConfig:
    """The size of the golden files, without dropout."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 2,
    } | fields.pop("vision_config", {})
    text = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "fusion_layer": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    } | fields.pop("text_config", {})
    return TCLConfig(vision_config=vision, text_config=text, **{"projection_dim": 16, "queue_size": 20, **fields})


def small_patches(**fields) -> TCLConfig:
    """A tiny config with few patches, for tests that run many steps."""
    return tiny_config(vision_config={"patch_size": 8} | fields.pop("vision_config", {}), **fields)


class Golden:
    """One golden file: the original's state, inputs, outputs, gradients, and state after the step."""

    def __init__(self, name: str):
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")

    def __getitem__(self, kind: str) -> dict[str, torch.Tensor]:
        prefix = f"{kind}."
        return {k.removeprefix(prefix): v.clone() for k, v in self.tensors.items() if k.startswith(prefix)}

    def load(self, model):
        """Give a model the original's weights; nothing may be left over on either side."""
        result = model.load_state_dict(from_original(self["state"], model.config), strict=False)
        assert not result.unexpected_keys
        # A pre-training checkpoint of the original keeps no image ids, a fine-tuned one nothing of the contrast.
        contrast = {"tcl.temperature", *(key for key in result.missing_keys if "_projection." in key)}
        assert set(result.missing_keys) <= {"queue.ids"} | (contrast if "temp" not in self["state"] else set())
        return model


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def fixed_negatives(monkeypatch):
    """Use the hard negatives that the original drew."""

    def fix(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        drawn = iter([inputs.pop("negative_image_index"), inputs.pop("negative_text_index")])
        monkeypatch.setattr(
            "tcl_hf.modeling_tcl.sample_hard_negatives",
            lambda logits, excluded: (next(drawn), torch.ones(len(logits), dtype=torch.bool)),
        )
        return inputs

    return fix


def training_batch(num_pairs: int = 4, length: int = 7, config: TCLConfig | None = None, seed: int = 0) -> dict:
    """A random batch with masked texts; texts have different lengths."""
    config = config or small_patches()
    generator = torch.Generator().manual_seed(seed)
    size = config.vision_config.image_size
    vocab = config.text_config.vocab_size
    input_ids = torch.randint(5, vocab, (num_pairs, length), generator=generator)
    input_ids[:, 0] = 2
    attention_mask = torch.ones(num_pairs, length, dtype=torch.long)
    for row in range(num_pairs):
        attention_mask[row, length - row % 3 :] = 0
    input_ids = input_ids * attention_mask
    chosen = (torch.rand(num_pairs, length, generator=generator) < 0.3) & attention_mask.bool()
    chosen[:, 0] = False
    return {
        "pixel_values": torch.randn(num_pairs, 3, size, size, generator=generator),
        "pixel_values_augmented": torch.randn(num_pairs, 3, size, size, generator=generator),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mlm_input_ids": input_ids.masked_fill(chosen, 4),
        "mlm_labels": input_ids.masked_fill(~chosen, -100),
    }


WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "house",
    "car",
    "runs",
    "sits",
    "near",
    "big",
    "small",
    "tree",
    "photo",
    "of",
    "the",
    "on",
]


def tiny_processor(size: int = 32) -> TCLProcessor:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, vocab_size=80)
    return TCLProcessor(TCLImageProcessorPil(size={"height": size, "width": size}), tokenizer)


def png(color: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture whose pixels follow from `color`."""
    pixels = np.random.default_rng(color).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "PNG")
    return file.getvalue()


def tiny_records(number: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": {"bytes": png(i), "path": None},
            "captions": [" ".join(rng.choice(WORDS, 4)) for _ in range(2)],
            "image_id": str(i),
        }
        for i in range(number)
    ]
