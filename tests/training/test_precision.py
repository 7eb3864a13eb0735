"""The precision of a run: bfloat16 only where the hardware has it."""

import pytest
import torch
from helpers import tiny_run

from tcl_hf.training import precision
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.engine import Engine

without = {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (without, False),
        (without | {"avx512_bf16": True}, True),
        (without | {"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "fp16_arith": True}, False),
    ],
)
def test_instructions_for_bfloat16_are_found(monkeypatch, capabilities, expected):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.cpu_has_bfloat16() == expected


def test_a_torch_that_cannot_say_is_trusted(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.cpu_has_bfloat16()


@pytest.mark.parametrize(
    ("asked", "has_it", "expected"),
    [
        ({"bf16": True}, True, "bf16"),
        ({"bf16": True}, False, "no"),
        ({"fp16": True}, False, "fp16"),
        ({}, False, None),
    ],
)
def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch, tmp_path, asked, has_it, expected):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_it)
    args = TCLTrainingArguments(output_dir=str(tmp_path), **asked)
    assert precision.mixed_precision_of(args) == expected
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with precision.in_precision_of(args):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtypes.get(expected, torch.float32)
    assert Engine(args).accelerator.mixed_precision == (expected or "no")


def test_a_run_on_such_a_cpu_equals_one_in_float32_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    precision.logger.warning_once.cache_clear()
    monkeypatch.setattr(precision.logger, "propagate", True)
    tiny_run(tmp_path / "asked", max_steps=2, bf16=True)
    tiny_run(tmp_path / "float32", max_steps=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("asked", "float32")]
    assert weights[0] == weights[1]
    assert "this CPU has no instructions for bfloat16" in caplog.text
