"""Fixtures of all tests."""

import os
import shutil

import helpers  # first: it sets the environment
import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(scope="session", autouse=True)
def remove_cache():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of a process; each test chooses its own."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def bfloat16_everywhere(monkeypatch):
    """Let runs that ask for bfloat16 compute in it on every CPU, however slowly."""
    monkeypatch.setattr("tcl_hf.training.precision.cpu_has_bfloat16", lambda: True)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The folder of a run of six steps that was never stopped."""
    folder = tmp_path_factory.mktemp("reference")
    helpers.tiny_run(folder)
    return folder


@pytest.fixture
def golden():
    return helpers.Golden


@pytest.fixture
def fixed_negatives(monkeypatch):
    """Use the hard negatives that the original drew."""

    def fix(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        drawn = iter([inputs.pop("negative_image_index"), inputs.pop("negative_text_index")])
        monkeypatch.setattr(
            "tcl_hf.models.modeling_tcl.sample_hard_negatives",
            lambda logits, excluded: (next(drawn), torch.ones(len(logits), dtype=torch.bool)),
        )
        return inputs

    return fix
