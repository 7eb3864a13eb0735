"""Tiny models behind the service and the app."""

from pathlib import Path

import pytest
import torch
from helpers import WORDS, config_of, png, tiny_processor

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
)
from tcl_hf.app.heads import Heads
from tcl_hf.search import ImageIndex

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


@pytest.fixture(scope="session")
def index(heads, tmp_path_factory) -> ImageIndex:
    """Twelve pictures with captions, in an index made with the model of `heads`."""
    pytest.importorskip("lancedb", reason="LanceDB is not installed (tcl_hf[search])")
    index = ImageIndex.create(tmp_path_factory.mktemp("index") / "pictures", heads.embedder.searcher)
    images = [{"bytes": png(number), "path": None} for number in range(12)]
    captions = [f"a {word} dog" for word in WORDS[1:13]]
    records = zip(images, captions, strict=True)
    index.add([{"image": image, "captions": [text], "image_id": text} for image, text in records], progress=False)
    return index
