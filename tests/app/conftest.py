"""Tiny models behind the service and the app."""

from pathlib import Path

import pytest
import torch
from helpers import config_of, tiny_processor

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from tcl_hf.app.heads import Heads

CLASSES = {
    "retrieval": TCLForImageTextRetrieval,
    "answers": TCLForQuestionAnswering,
    "entailment": TCLForVisualEntailment,
    "reasoning": TCLForVisualReasoning,
}


def save_tiny(model_class, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    processor = tiny_processor()
    fields = {"use_momentum_teacher": False, "text_config": {"vocab_size": len(processor.tokenizer)}}
    model_class(config_of(**fields)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(model_class, root / name) for name, model_class in CLASSES.items()}


@pytest.fixture(scope="session")
def heads(model_folders) -> Heads:
    """The heads of a retrieval model, a question answering model, and one that judges statements about one picture."""
    return Heads([str(model_folders[name]) for name in ("retrieval", "answers", "entailment")], "cpu")
