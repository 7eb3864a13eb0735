"""A cased vocabulary of many scripts: training, evaluation, pipelines and remote code read the same tokens."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import png
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tcl_hf import TCLForPreTraining, TCLModel, TCLProcessor, TCLTokenizer
from tcl_hf.cli import evaluate, pretrain
from tcl_hf.data.collators import TCLTaskCollator
from tcl_hf.inference.grounding import phrase_span, phrase_tokens
from tcl_hf.recipes.build import add_words
from tcl_hf.sharing.hub import export

# Beside each word stands the one that lower case or stripped accents would make of it.
WORDS = [
    "Ein",
    "ein",
    "Hund",
    "hund",
    "café",
    "cafe",
    "Кот",
    "кот",
    "спит",
    "каф",
    "##é",
    "##e",
    "й",
    "и",
    "犬",
    "跑",
    "在",
]
VOCABULARY = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
CAPTIONS = {
    "Ein Hund - café!": ["Ein", "Hund", "café"],
    "Кот спит.": ["Кот", "спит"],
    "犬在跑, Кот": ["犬", "在", "跑", "Кот"],
    "кот/Ein café?": ["кот", "Ein", "café"],
}
EXPECTED = {text: [2, *(VOCABULARY[word] for word in words)] for text, words in CAPTIONS.items()}
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = Image.new("RGB", (20, 20), "red")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run from a tiny multilingual BERT, the data, and the texts that the encoder was given."""
    folder = tmp_path_factory.mktemp("multilingual")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(VOCABULARY), **sizes)).save_pretrained(folder / "bert")
    BertTokenizer(VOCABULARY, do_lower_case=False, strip_accents=False).save_pretrained(folder / "bert")
    rows = []
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(png(number))
        rows.append({"image": f"{number}.png", "caption": caption})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    AcceleratorState._reset_state(True)
    with seen_texts() as seen:
        pretrain.main(
            [
                *("--data", str(folder / "data.json"), "--text_model", str(folder / "bert")),
                *("--config", json.dumps({"queue_size": 8, "vision_config": VISION | {"intermediate_size": 32}})),
                *("--fusion_layer", "1", "--image_size", "16", "--output_dir", str(folder / "run")),
                *("--max_steps", "3", "--per_device_train_batch_size", "4", "--dataloader_num_workers", "0"),
                *("--validation_share", "0"),
            ]
        )
    return folder / "run", folder / "data.json", seen


class seen_texts:
    """Notes the ids of each text that the text encoder reads, without padding."""

    def __enter__(self) -> set[tuple[int, ...]]:
        self.encode, seen = TCLModel.encode_text, set()

        def noting(model, input_ids, attention_mask=None):
            masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seen.update(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, masks, strict=True))
            return self.encode(model, input_ids, attention_mask)

        TCLModel.encode_text = noting
        return seen

    def __exit__(self, *error):
        TCLModel.encode_text = self.encode


def test_training_reads_capitals_accents_and_all_scripts(run):
    assert set(map(tuple, EXPECTED.values())) <= run[2]


def test_evaluation_reads_what_training_read(run):
    folder, data, _ = run
    AcceleratorState._reset_state(True)
    with seen_texts() as seen:
        evaluate.main(["--model", str(folder), "--data", str(data), "--results", str(folder / "results")])
    assert seen == set(map(tuple, EXPECTED.values()))


def test_a_saved_processor_and_its_tokenizer_read_what_training_read(run):
    processor, tokenizer = AutoProcessor.from_pretrained(run[0]), AutoTokenizer.from_pretrained(run[0])
    assert (tokenizer.do_lower_case, tokenizer.strip_accents) == (False, False)
    for text, expected in EXPECTED.items():
        assert processor(text=text)["input_ids"] == tokenizer(text)["input_ids"] == expected
    assert processor(text="Ein [MASK], café")["input_ids"] == [2, 5, 4, 9]


def test_the_pipeline_reads_what_training_read(run):
    matching = pipeline("image-text-matching", model=str(run[0]), device="cpu")
    with seen_texts() as seen:
        results = matching({"image": IMAGE, "text": list(EXPECTED)})
    assert seen == set(map(tuple, EXPECTED.values())) and len({result["score"] for result in results}) == 4


def test_a_question_and_a_phrase_keep_their_capitals(run):
    processor = AutoProcessor.from_pretrained(run[0])
    assert processor.clean_question("Ein Hund, (Кот)?") == "Ein Hund Кот"
    collator = TCLTaskCollator(processor, with_answers=False)
    batch = collator([{"image": IMAGE, "question": "Ein Hund?", "answers": ["café"]}])
    assert batch["input_ids"].tolist() == [[2, 5, 7]]
    assert processor.encode_answers(["café Кот"])[0].tolist() == [[2, 9, 11, 3]]
    caption = "Ein Hund - café!"
    assert phrase_tokens(processor, caption, *phrase_span(caption, "café")).tolist() == [False, False, False, True]


def test_the_code_that_travels_reads_what_training_read(run, tmp_path):
    export(run[0], tmp_path / "shared", with_code=True)
    shared = str(tmp_path / "shared")
    # The classes are named, because the Auto classes prefer those of this package where it is imported.
    tokenizer = get_class_from_dynamic_module("tokenization_tcl.TCLTokenizer", shared).from_pretrained(shared)
    pixels = AutoImageProcessor.from_pretrained(shared)
    processor = get_class_from_dynamic_module("processing_tcl.TCLProcessor", shared)(pixels, tokenizer)
    assert type(processor) is not TCLProcessor and type(tokenizer) is not TCLTokenizer
    for text, expected in EXPECTED.items():
        assert processor(text=text)["input_ids"] == processor.tokenizer(text)["input_ids"] == expected


def test_words_that_are_added_keep_their_capitals(run):
    model, processor = TCLForPreTraining.from_pretrained(run[0]), AutoProcessor.from_pretrained(run[0])
    records = Dataset.from_list([{"question": "Москва, Hund?", "answers": ["Ein"]}])
    assert add_words(model, processor, records) == ["Москва"]
    assert processor(text="Москва москва")["input_ids"] == [2, len(VOCABULARY), 1]
