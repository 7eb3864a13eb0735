"""The table of tasks: batches, evaluators against plain loops, protocols, and both scripts end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    ROOT,
    phrases,
    picture,
    png,
    questions,
    small_patches,
    statements,
    tiny,
    tiny_processor,
    tiny_records,
)

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
)
from tcl_hf.data.annotations.questions import QUESTION_FEATURES
from tcl_hf.data.collators import TCLPreTrainingCollator, TCLTaskCollator, image_number
from tcl_hf.data.images import open_image
from tcl_hf.data.pairs import DataError
from tcl_hf.data.sampling import SharedImages
from tcl_hf.evaluation.answers import answer_metrics, answer_questions
from tcl_hf.evaluation.classes import evaluate_classes
from tcl_hf.evaluation.grounding import evaluate_grounding
from tcl_hf.evaluation.retrieval import evaluate_retrieval
from tcl_hf.inference.grounding import heat_point, matching_heat_map, similarity_heat_map
from tcl_hf.recipes.arguments import RecipeError
from tcl_hf.recipes.build import name_of
from tcl_hf.recipes.tasks import (
    TASKS,
    TaskArguments,
    add_words,
    build_task_collator,
    candidate_answers,
    load_task,
    protocol,
    shuffle_images,
)

# Batches


def test_a_batch_of_statements_has_labels_by_name():
    processor = tiny_processor()
    collator = TCLTaskCollator(processor, label2id={"no": 0, "yes": 1})
    batch = collator(statements(("yes", "no"), 3))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    expected = processor(images=[open_image(picture(0))], return_tensors="pt")
    assert torch.equal(batch["pixel_values"][0], expected["pixel_values"][0])


def test_two_images_are_stacked_side_by_side():
    batch = TCLTaskCollator(tiny_processor(), label2id={"True": 1, "False": 0})(statements(("True",), 2, images=2))
    assert batch["pixel_values"].shape == (2, 2, 3, 32, 32)


def test_texts_about_the_same_image_share_it():
    """Where they come as one record, as from `SharedImages`, they get one view."""
    processor = tiny_processor()
    rows = questions(5)
    for row, source in ((1, 0), (4, 0)):
        rows[row] |= {"image": rows[source]["image"]}
    shared = SharedImages(Dataset.from_list(rows))
    assert [[r["question_id"] for r in item["records"]] for item in shared] == [["0", "1", "4"], ["2"], ["3"]]
    together, apart = (
        TCLTaskCollator(processor)(list(shared)),
        TCLTaskCollator(processor)([rows[i] for i in (0, 1, 4, 2, 3)]),
    )
    assert together.pop("image_index").tolist() == [0, 0, 0, 1, 2]
    assert torch.equal(together.pop("pixel_values"), apart.pop("pixel_values")[[0, 3, 4]])
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in apart)


def test_of_texts_that_share_an_image_a_bad_one_is_left_out_alone():
    rows = questions(3)
    rows[1] |= {"question": " ", "image": rows[0]["image"]}
    collator = TCLTaskCollator(tiny_processor())
    batch = collator(list(SharedImages(Dataset.from_list(rows))))
    assert len(batch["input_ids"]) == 2 and "image_index" not in batch
    assert collator.skipped.count == 1 and "no question" in collator.skipped.last


def test_sharing_images_is_for_tasks_with_one_text_after_the_other():
    with pytest.raises(RecipeError, match="share_images: 'retrieval' draws one caption"):
        TaskArguments(task="retrieval", share_images=True)


def test_neighbours_about_one_image_are_evaluated_together_with_the_same_result(monkeypatch):
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    for row in (1, 2, 4):
        rows[row] |= {"images": rows[row - 1]["images"]}
    encoded = []
    encode = TCLModel.encode_image
    monkeypatch.setattr(TCLModel, "encode_image", lambda self, p, **k: encoded.append(len(p)) or encode(self, p, **k))
    found = evaluate_classes(model, processor, rows, batch_size=5)
    assert encoded == [2 * 2, 2]  # rows 0 to 2, and 3 and 4; row 5
    for row, prediction in zip(rows, found.predictions, strict=True):
        with torch.no_grad():
            shares = model(**TCLTaskCollator(processor)([row])).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)


def test_a_label_of_another_spelling_is_refused_with_its_record():
    collator = TCLTaskCollator(tiny_processor(), label2id={"no": 0, "yes": 1}, empty_batches=True)
    with pytest.raises(DataError, match=r"Record 0 has the label 'maybe': the model knows no, yes"):
        collator(statements(("maybe",), 1))


def test_answers_weigh_by_how_often_they_were_given():
    processor = tiny_processor()
    batch = TCLTaskCollator(processor)(questions(3))
    assert batch["question_index"].tolist() == [0, 1, 1, 2, 2]
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([1.0, 0.5 * 2 / 3, 0.5 / 3, 2 / 3, 1 / 3]))
    rows = [[i for i in row if i != -100] for row in batch["labels"].tolist()]
    texts = processor.tokenizer.batch_decode(rows)
    assert texts == [f"[CLS] {a} [SEP]" for a in ("green", "red", "big cat", "red", "big cat")]


def test_questions_are_cleaned():
    processor = tiny_processor()
    batch = TCLTaskCollator(processor)(questions(2))
    expected = processor.tokenizer(["big dog", "what is the green near"], padding=True)["input_ids"]
    assert batch["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"answers": []}, "no answer"), ({"question": " "}, "no question"), ({"image": None}, "no image")],
)
def test_what_can_not_be_asked_is_left_out_and_listed(change, reason):
    collator = TCLTaskCollator(tiny_processor())
    rows = questions(3)
    rows[1] |= change
    batch = collator(rows)
    assert len(batch["input_ids"]) == 2 and collator.skipped.count == 1
    assert reason in collator.skipped.last


def test_long_answers_are_cut_and_keep_their_end():
    processor = tiny_processor()
    ids, mask = processor.encode_answers(["red dog " * 20, "cat"], max_tokens=6)
    assert ids.shape == (2, 6)
    assert ids[0, -1] == processor.tokenizer.sep_token_id
    assert ids[1].tolist()[-3:] == [processor.tokenizer.pad_token_id] * 3
    assert mask.tolist() == [[1] * 6, [1] * 3 + [0] * 3]


def test_image_ids_are_equal_where_the_image_is():
    collator = TCLPreTrainingCollator(tiny_processor(), mlm_probability=0, with_image_ids=True)
    rows = tiny_records(3)
    batch = collator([rows[0], rows[1], rows[0]])
    ids = batch["image_ids"].tolist()
    assert ids[0] == ids[2] != ids[1] and min(ids) >= 0
    assert image_number(None) == -100


# Evaluators


def test_classes_equal_a_plain_loop_and_are_scored():
    model, processor = tiny(TCLForVisualEntailment)
    rows = statements(("entailment", "neutral", "contradiction"), 7)
    found = evaluate_classes(model.train(), processor, rows, batch_size=3)
    assert model.training
    model.eval()
    for row, prediction in zip(rows, found.predictions, strict=True):
        batch = TCLTaskCollator(processor)([row])
        with torch.no_grad():
            shares = model(**batch).logits.softmax(-1)[0]
        assert prediction["label"] == model.config.id2label[int(shares.argmax())]
        torch.testing.assert_close(torch.tensor(list(prediction["scores"].values())), shares, rtol=0, atol=1e-5)
    right = sum(row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True))
    assert found.metrics["accuracy"] == pytest.approx(100 * right / 7)
    assert found.metrics["most_frequent_label"] == pytest.approx(100 * 3 / 7)


def test_two_image_reasoning_is_scored_by_sentence_too():
    model, processor = tiny(TCLForVisualReasoning)
    rows = statements(("True", "False"), 6, images=2)
    found = evaluate_classes(model, processor, rows)
    right = [row["label"] == p["label"] for row, p in zip(rows, found.predictions, strict=True)]
    whole = [right[i] and right[i + 1] for i in (0, 2, 4)]
    assert found.metrics["consistency"] == pytest.approx(100 * sum(whole) / 3)


@pytest.mark.parametrize("k", [2, 50])
def test_answers_equal_a_plain_loop_over_candidates(k):
    model, processor = tiny(TCLForQuestionAnswering)
    rows, candidates = questions(5), ["red", "green dog", "big cat house", "blue", "a"]
    found = answer_questions(model, processor, rows, candidates, k=k, batch_size=2)
    for row, prediction in zip(rows, found, strict=True):
        batch = TCLTaskCollator(processor, with_answers=False, max_tokens=50)([row])
        scores = []
        with torch.no_grad():
            for candidate in candidates:
                labels, _ = processor.encode_answers([candidate])
                logits = model(**batch, labels=labels).logits.log_softmax(-1)[0]  # (L - 1, V)
                each = logits.gather(-1, labels[0, 1:, None]).flatten()
                scores.append((each[0].item(), (each.sum() + each[0]).item()))
        among = sorted(range(5), key=lambda c: -scores[c][0])[:k]
        assert prediction["answer"] == candidates[max(among, key=lambda c: scores[c][1])]
        assert prediction["question_id"] == row["question_id"]


def test_single_answers_are_compared_after_normalisation_and_lists_as_sets():
    truth = ["2", "cup, books", "red", "red"]
    rows = [{"question_id": str(i), "answers": [answer]} for i, answer in enumerate(truth)]
    said = ["two", "books, cup", "blue", "Red"]
    predictions = [{"question_id": str(i), "answer": answer} for i, answer in enumerate(said)]
    metrics = answer_metrics(predictions, rows, ["red", "2"])
    assert metrics == {"accuracy": 75.0, "most_frequent_answer": 50.0, "answer_is_a_candidate": 75.0}


def test_several_answers_are_scored_by_the_official_rule():
    rows = [{"question_id": "7", "answers": ["red"] * 2 + ["blue"] * 8, "answer_type": "other"}]
    metrics = answer_metrics([{"question_id": "7", "answer": "red"}], rows, [])
    # Leaving one out: 2 of 10 times one "red" is left, 8 times two: (2 * 1/3 + 8 * 2/3) / 10.
    assert metrics["accuracy"] == pytest.approx(60.0)
    assert answer_metrics([{"question_id": "7", "answer": "red"}], [{"question_id": "7", "answers": []}], []) == {}


def test_grounding_equals_a_plain_loop_and_counts_phrases_with_boxes():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=2, batch_size=3)
    assert found.metrics["phrases"] == 4
    hits = 0
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=row["captions"][1], return_tensors="pt")
        maps = matching_heat_map(model, **inputs, layer=2)[0]
        words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        last = max(i for i, word in enumerate(words) if word == "dog")
        x, y = heat_point(maps[1 : last + 1].mean(0), image.size)
        assert prediction["point"] == [x, y]
        hits += 2 <= x <= 20 and 2 <= y <= 20
    assert found.metrics["pointing_accuracy"] == pytest.approx(100 * hits / 4)
    assert found.metrics["random_point"] == pytest.approx(100 * 18 * 18 / (40 * 30))


def test_grounding_by_similarity_reads_the_phrase_alone():
    model, processor = tiny(TCLForImageTextRetrieval)
    rows = phrases(4)
    found = evaluate_grounding(model, processor, rows, layer=0, batch_size=3, heat="similarity")
    assert found.metrics["phrases"] == 4
    for row, prediction in zip(rows, found.predictions, strict=True):
        image = open_image(row["image"]).convert("RGB")
        inputs = processor(images=image, text=prediction["phrase"], return_tensors="pt")
        x, y = heat_point(similarity_heat_map(model, **inputs, layer=0)[0], image.size)
        assert prediction["point"] == [x, y]
    with pytest.raises(ValueError, match="heat='cold' is no kind of heat map"):
        evaluate_grounding(model, processor, rows, heat="cold")
    with pytest.raises(RecipeError, match="there is no map of 'cold'"):
        TaskArguments(task="grounding", heat="cold")


def test_states_in_half_precision_change_little_and_stay_on_the_cpu():
    model, processor = tiny(TCLForImageTextRetrieval)
    whole = evaluate_retrieval(model, processor, tiny_records(7), k=3)
    half = evaluate_retrieval(model, processor, tiny_records(7), k=3, states_dtype=torch.float16)
    similar = [name for name in whole if not name.startswith("reranked")]
    assert {name: half[name] for name in similar} == {name: whole[name] for name in similar}
    assert abs(half["reranked_recall_mean"] - whole["reranked_recall_mean"]) <= 10


TWO_PROCESSES = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from helpers import phrases, questions, statements, tiny, tiny_records
from tcl_hf import *
from tcl_hf.evaluation.answers import *
from tcl_hf.evaluation.classes import *
from tcl_hf.evaluation.grounding import *
from tcl_hf.evaluation.retrieval import *
from tcl_hf.evaluation.shares import *
dist.init_process_group("gloo")
model, processor = tiny(TCLForImageTextRetrieval)
found = [evaluate_retrieval(model, processor, tiny_records(7), k=3, batch_size=2)]
found.append(evaluate_grounding(model, processor, phrases(3), batch_size=2).metrics)
model, processor = tiny(TCLForVisualEntailment)
rows = statements(("entailment", "neutral", "contradiction"), 7)
found.append(evaluate_classes(model, processor, rows, batch_size=2).predictions)
model, processor = tiny(TCLForQuestionAnswering)
found.append(answer_questions(model, processor, questions(5), ["red", "green dog", "a"], batch_size=2))
open(f"{sys.argv[1]}-{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


def test_processes_share_the_work_and_all_get_the_whole_result(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for processes in (2, 1):
        out = tmp_path / f"of-{processes}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*command, str(script), str(out)], cwd=ROOT, env=env, check=True, capture_output=True)
        results += [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes)]
    for other in results[:2]:
        for mine, alone in zip(other, results[2], strict=True):
            if isinstance(mine, dict):
                assert mine == pytest.approx(alone, abs=1e-5)
            else:
                assert [p.get("label", p.get("answer")) for p in mine] == [
                    p.get("label", p.get("answer")) for p in alone
                ]


# The table


def test_every_task_has_what_training_needs():
    for name, task in TASKS.items():
        args = TaskArguments(task=name)
        collator = build_task_collator(args, TCLConfig(), tiny_processor())
        assert isinstance(collator, TCLPreTrainingCollator) == task.makes_pairs
        assert (task.evaluate is None) == (task.metric == "")


def test_protocols_tell_what_a_model_has_learned_from():
    def of(*history):
        config = TCLConfig(trained_on=[{"task": task, "data": data} for task, data in history])
        return protocol(config, "retrieval", "flickr30k")

    assert protocol(TCLConfig(), "retrieval", "flickr30k") == "zero_shot"
    assert of(("pretraining", ["coco", "vg"])) == "zero_shot"
    assert of(("pretraining", ["coco"]), ("retrieval", ["coco"])) == "zero_shot_from_coco"
    assert of(("pretraining", ["coco"]), ("retrieval", ["flickr30k"])) == "finetuned"
    assert of(("pretraining", ["flickr30k", "coco"])) == "pretrained_on_flickr30k"
    assert of(("visual_entailment", ["snli_ve"])) == "zero_shot"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/json_down/coco_train.json", "coco"),
        ("runs/x/flickr8k/", "flickr8k"),
        ("ve_dev.json", "ve"),
        ("data/pairs-*.tar", "pairs"),
        ("train.jsonl", "train"),
        ("openmoji", "openmoji"),
    ],
)
def test_data_is_called_by_its_name_without_the_split(source, name):
    assert name_of([source]) == name


def test_shuffled_images_are_those_of_other_records():
    rows = [{"image": i, "label": i} for i in range(9)]
    shuffled = shuffle_images(rows)
    assert sorted(row["image"] for row in shuffled) == list(range(9))
    assert all(row["image"] != row["label"] for row in shuffled)
    assert [row["image"] for row in rows] == list(range(9))


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


def test_records_that_can_not_be_evaluated_are_left_out_and_said(caplog):
    args = TaskArguments(task="visual_entailment", data=["scenes"], validation_split="test")
    with pytest.raises(DataError, match="no split 'test'"):
        load_task(args, validation=True)


# The scripts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    processor = tiny_processor(16)
    TCLForPreTraining(small_patches(vision_config={"image_size": 16})).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_script(name: str, *argv: object) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def write_entailment(folder: Path, number: int = 8) -> Path:
    rows = []
    for i, row in enumerate(statements(("entailment", "neutral", "contradiction"), number)):
        (folder / f"{i}.jpg").write_bytes(png(i))
        rows.append({"image": str(i), "sentence": row["captions"][0], "label": row["label"]})
    file = folder / "ve_train.json"
    file.write_text(json.dumps(rows))
    return file


def test_both_scripts_run_a_task_from_files_to_results(checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = write_entailment(tmp_path)
    common = ["--recipe", "tcl_snli_ve", "--data", file, "--validation_data", file]
    common += ["--image_root", tmp_path, "--image_size", 16, "--dataset_name", "tiny_ve", "--dataloader_num_workers", 0]
    out = tmp_path / "out"
    ran = run_script(
        "finetune.py", *common, "--model", checkpoint, "--output_dir", out, "--num_train_epochs", 2,
        "--per_device_train_batch_size", 4,
        "--eval_steps", 2,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "protocol finetuned" in ran.stdout
    card = (out / "README.md").read_text()
    assert "tiny_ve" in card and "protocol: finetuned" in card
    model = TCLForVisualEntailment.from_pretrained(out)
    assert model.config.trained_on == [{"task": "visual_entailment", "data": ["tiny_ve"]}]

    ran = run_script("evaluate.py", *common, "--model", out, "--shuffle_images", "true")
    assert ran.returncode == 0, ran.stderr
    said = json.loads((out / "evaluation.json").read_text())
    assert (said["protocol"], said["resolution"], said["records"]) == ("finetuned", 16, 8)
    assert said["images_shuffled"] is True and 0 <= said["metrics"]["accuracy"] <= 100
    assert len(json.loads((out / "predictions.json").read_text())) == 8
    assert (out / "predictions.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "nowhere can not be opened"),
        (["--task", "captioning"], "no task 'captioning'"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, argv, message):
    given = ["--recipe", "tcl_snli_ve", "--model", checkpoint, "--image_size", 16, *argv]
    ran = run_script("finetune.py", *given)
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in ran.stderr
