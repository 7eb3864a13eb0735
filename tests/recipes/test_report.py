"""The report of a run: table, curves, sheet and card, from measured numbers."""

import json
import sys

import pytest
import torch
from helpers import picture, small_patches, tiny_processor, tiny_records
from huggingface_hub import ModelCard
from PIL import Image

from tcl_hf import TCLForImageTextRetrieval
from tcl_hf.evaluation.protocol import EvaluationProtocol
from tcl_hf.recipes import report as report_module
from tcl_hf.recipes.arguments import FinetuningDataArguments, PretrainingDataArguments
from tcl_hf.recipes.report import (
    Run,
    _caption_of,
    _on_sheet,
    different_pictures,
    picture_sheet,
    plot_training,
    prediction_sheet,
    results_table,
    sample_sheet,
    task_table,
    write_finetuning_report,
    write_pretraining_report,
)

NAMES = [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)] + ["recall@1", "recall@5", "recall@10"]
METRICS = {name: 10.0 + number for number, name in enumerate(NAMES)}
METRICS |= {f"reranked_{name}": 50.0 + number for number, name in enumerate(NAMES)}
COMBINED = {f"combined_{name}": 70.0 + number for number, name in enumerate(NAMES)} | {"rerank_weight": 0.125}


def test_the_table_puts_results_below_chance_and_baselines():
    baselines = {"ridge": dict.fromkeys(NAMES, 5.0), "linear head": dict.fromkeys(NAMES, 6.0)}
    rows = results_table(METRICS | COMBINED, 40, 8, baselines).splitlines()
    assert rows[0].startswith("| recall in % of 40 ")
    assert rows[2] == "| chance | 2.50 | 12.50 | 25.00 | 2.50 | 12.50 | 25.00 | 2.50 | 12.50 | 25.00 |"
    assert rows[3].startswith("| ridge | 5.00 |") and rows[4].startswith("| linear head | 6.00 |")
    recalls = "10.00 | 11.00 | 12.00 | 13.00 | 14.00 | 15.00 | 16.00 | 17.00 | 18.00"
    assert rows[5] == f"| this model, by similarity | {recalls} |"
    assert rows[6].startswith("| this model, re-ranked by matching (k = 8) | 50.00 |")
    assert rows[7].startswith("| this model, combined (k = 8, weight 0.125) | 70.00 |")
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 8


def test_the_table_has_only_the_scores_that_were_measured():
    assert len(results_table(METRICS, 40, 8).splitlines()) == 5  # chance, similarity, re-ranked
    assert len(results_table(dict.fromkeys(NAMES, 1.0), 40, 8).splitlines()) == 4


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path_factory.mktemp("reports") / "my-run"
    folder.mkdir()
    lines = [{"step": 1, "loss": 3.0, "loss_cma": 2.0}, {"step": 1, "recall@1": 5.0, "reranked_recall@1": 6.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    command = "accelerate launch scripts/pretrain.py"
    protocol = EvaluationProtocol("retrieval", "openmoji", "validation", 9, "pretrained_on_openmoji", 32, k=4)
    run = Run(PretrainingDataArguments(), "100 pairs", [], command, folder, protocol)
    model = TCLForImageTextRetrieval(small_patches())
    baselines = {"ridge": dict.fromkeys(NAMES, 5.0)}
    measured = METRICS | COMBINED
    model.config.rerank_weight = 0.125
    # Nine are the held-out pictures again.
    options = {"num_tuning": 11, "free_texts": ["a red thing", "the sea"], "others": [tiny_records(14)]}
    table = write_pretraining_report(run, model, tiny_processor(), tiny_records(9), measured, baselines, **options)
    return folder, table


def test_a_report_has_curves_and_sheets(report):
    folder, _ = report
    for name in ("training.png", "retrieved.png", "free_texts.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_the_card_states_results_in_text_and_metadata(report):
    folder, table = report
    card = ModelCard.load(folder / "README.md")
    assert table in card.content
    assert "OpenMoji" in card.content
    assert "100 pairs of openmoji" in card.content
    assert card.data.license == "cc-by-sa-4.0"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["recall@1"] == METRICS["recall@1"]
    assert results["reranked_recall@1"] == METRICS["reranked_recall@1"]
    assert results["combined_recall@1"] == COMBINED["combined_recall@1"]
    assert "rerank_weight" not in results
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}


def test_the_card_explains_the_scores(report):
    content = " ".join(ModelCard.load(report[0] / "README.md").content.split())
    for sentence in (
        "Re-ranking scores the 4 most similar candidates of each query by the matching head alone.",
        "plus 0.125 times the log-odds of matching; this weight was chosen on 11 samples that were cut off",
        "The baselines are linear maps",
        "Pictures retrieved by the combined score, the right one framed.",
        "Pictures that the combined score finds among 14, those of training among them, for texts that belong to none",
    ):
        assert sentence in content


def test_a_model_that_does_not_match_has_a_report_by_similarity(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "loss_cma": 3.0}')
    protocol = EvaluationProtocol("retrieval", "openmoji", "validation", 3, "pretrained_on_openmoji", 32, k=4)
    run = Run(PretrainingDataArguments(), "100 pairs", [], "pretrain.py", tmp_path, protocol)
    model = TCLForImageTextRetrieval(small_patches(itm_weight=0, mlm_weight=0, text_config={"fusion_layer": 4}))
    table = write_pretraining_report(run, model, tiny_processor(), tiny_records(3), dict.fromkeys(NAMES, 1.0))
    content = " ".join(ModelCard.load(tmp_path / "README.md").content.split())
    assert "this model, by similarity" in table and "matching" not in content
    assert "Pictures retrieved by similarity" in content and not (tmp_path / "free_texts.png").exists()


@pytest.mark.parametrize(("number", "words"), [(1, "one caption"), (5, "5 captions"), (None, "all captions")])
def test_the_card_names_the_number_of_captions_that_were_retrieved(tmp_path, number, words):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "loss_cma": 3.0}')
    protocol = EvaluationProtocol("retrieval", "openmoji", "validation", 3, "pretrained_on_openmoji", 32, k=4)
    run = Run(PretrainingDataArguments(eval_captions=number), "3 pairs", [], "pretrain.py", tmp_path, protocol)
    model = TCLForImageTextRetrieval(small_patches(itm_weight=0, mlm_weight=0, text_config={"fusion_layer": 4}))
    write_pretraining_report(run, model, tiny_processor(), tiny_records(3), dict.fromkeys(NAMES, 1.0))
    assert f"with {words} per image." in " ".join((tmp_path / "README.md").read_text().split())


def test_a_picture_that_cannot_be_drawn_loses_no_card(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "loss_cma": 3.0}')
    protocol = EvaluationProtocol("retrieval", "openmoji", "validation", 3, "pretrained_on_openmoji", 32, k=4)
    run = Run(PretrainingDataArguments(), "3 pairs", [], "pretrain.py", tmp_path, protocol)
    model = TCLForImageTextRetrieval(small_patches(itm_weight=0, mlm_weight=0, text_config={"fusion_layer": 4}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    table = write_pretraining_report(run, model, tiny_processor(), tiny_records(3), dict.fromkeys(NAMES, 1.0))
    card = (tmp_path / "README.md").read_text()
    assert table in card and "training.png" not in card and "retrieved.png" not in card
    assert "plot_training failed, and its picture is left out: Curves and picture sheets need matplotlib" in caplog.text
    assert "picture_sheet failed" in caplog.text


def test_texts_with_the_marks_of_formulas_are_drawn_as_they_are(tmp_path, caplog):
    records = [record | {"captions": [r"costs $\foo$ and ${"]} for record in tiny_records(3)]
    picture_sheet(records, [r"$\foo$"], [[0, 1]], tmp_path / "sheet.png")
    sample_sheet(records, tmp_path / "samples.png")
    predictions = [{"image_id": record["image_id"], "label": r"$\bar{"} for record in records]
    prediction_sheet([record | {"label": "$"} for record in records], predictions, tmp_path / "predictions.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"sheet.png", "samples.png", "predictions.png"}
    assert not caplog.records


def test_the_right_picture_is_framed_and_free_texts_have_none(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records, texts, found = tiny_records(3), ["a dog", "a cat"], [[2, 0], [1, 2]]
    for right, has_green in (([0, 1], True), ([1, 0], False), (None, False)):
        picture_sheet(records, texts, found, tmp_path / "sheet.png", right)
        with Image.open(tmp_path / "sheet.png") as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
        assert ((44, 160, 44) in colours) == has_green  # matplotlib's tab:green


def test_a_search_of_several_data_sets_meets_each_picture_once(monkeypatch):
    assert len(different_pictures([tiny_records(9), tiny_records(14), []])) == 14
    assert len(different_pictures([tiny_records(3)])) == 3
    monkeypatch.setattr(report_module, "MAX_SEARCHED", 5)
    ids = [record["image_id"] for record in different_pictures([tiny_records(14)])]
    assert ids == ["0", "3", "6", "9", "12"]


def test_curves_can_be_drawn_of_a_run_without_evaluation(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_training([{"step": 1, "loss": 1.0, "loss_itm": 0.6}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_task_s_table_stands_under_its_protocol():
    protocol = EvaluationProtocol("grounding", "scenes", "validation", 9, "finetuned", 64, heat="similarity")
    assert task_table({"step": 3, "epoch": 1, "pointing_accuracy": 91.128}, protocol).splitlines() == [
        "These are results for the task grounding, on 9 samples of the split validation of scenes, with the protocol "
        "finetuned, the resolution 64 and the heat map of similarity.",
        "",
        "| metric | value |",
        "|---|---|",
        "| pointing_accuracy | 91.13 |",
    ]


@pytest.fixture
def fine_tuned(tmp_path):
    """A run's folder with two evaluations, of which the first was better, and its `Run`."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = [{"step": 1, "loss": 3.0}, {"step": 1, "accuracy": 60.0}, {"step": 2, "loss": 2.5}]
    lines.append({"step": 2, "accuracy": 50.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data_args = FinetuningDataArguments(task="visual_entailment", dataset_name="tiny_ve")
    protocol = EvaluationProtocol("visual_entailment", "tiny_ve", "dev", 3, "finetuned", 32)
    return Run(data_args, "8 records", ["user/base"], "finetune.py", tmp_path, protocol)


def test_the_card_of_fine_tuning_has_the_metrics_of_the_model_that_was_kept(fine_tuned):
    records = [{"image": picture(0), "captions": ["a dog"]}]
    table = write_finetuning_report(fine_tuned, {"accuracy": 50.0}, "accuracy", records)
    assert "| accuracy | 60.00 |" in table
    card = ModelCard.load(fine_tuned.output_dir / "README.md")
    assert table in card.content and "fine-tuned for visual entailment by `tcl_hf` on 8 records of tiny_ve" in card.text
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_name, result.metric_value) == ("visual-entailment", "accuracy", 60.0)


def test_a_card_publishes_no_loss_as_a_result_where_nothing_was_evaluated(fine_tuned):
    (fine_tuned.output_dir / "metrics.jsonl").write_text('{"step": 2, "loss": 2.5}')
    write_finetuning_report(fine_tuned, {"step": 2, "loss": 2.5}, "", None)
    assert not ModelCard.load(fine_tuned.output_dir / "README.md").data.eval_results


@pytest.mark.parametrize(
    ("prediction", "record", "expected"),
    [
        ({"answer": "red"}, {"question": "which?", "answers": ["red", "blue"]}, ("which?", "red", "tab:green")),
        ({"answer": "red"}, {"question": "which?", "answers": ["blue"]}, ("which?", "red (blue)", "tab:red")),
        ({"label": "True"}, {"captions": ["two dogs"], "label": "False"}, ("two dogs", "True (False)", "tab:red")),
        ({"phrase": "a dog", "point": [1, 2]}, {"captions": ["a dog sits"]}, ("a dog", "", "black")),
    ],
)
def test_a_picture_of_the_sheet_has_text_result_and_colour(prediction, record, expected):
    assert _caption_of(prediction, record) == expected


def test_a_point_moves_with_its_picture_onto_the_sheet():
    """A picture of 80 x 40 pixels is doubled to 160 x 80, between bars of 40 pixels, in a frame of 2."""
    assert _on_sheet((10.0, 20.0), (80, 40)) == (22.0, 82.0)


def test_a_sheet_shows_predictions_of_records_with_one_and_two_images(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    records = [
        {"image_id": "0", "images": [picture(0), picture(1)], "captions": ["two dogs"], "label": "True"},
        {"image_id": "1", "image": picture(2), "captions": ["a dog"], "label": "False"},
    ]
    prediction_sheet(records, [{"image_id": str(n), "label": "True"} for n in range(2)], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 20
