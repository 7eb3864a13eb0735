"""The report of a run: tables of results, curves, sheets of pictures, and the model card."""

import functools
import io
import logging
import math
import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..data.images import open_image
from ..evaluation.protocol import EvaluationProtocol
from ..evaluation.retrieval import chance_recall, search_images
from ..models.modeling_tcl import TCLForImageTextRetrieval
from ..models.processing_tcl import TCLProcessor
from ..models.whole_files import replace_file
from ..sharing.cards import METHOD, Card, name_of_model
from ..training.log import METRICS, read_metrics
from .arguments import DataArguments
from .phases import Phase
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

CURVES = "training.png"
SHEET, FREE_SHEET = "retrieved.png", "free_texts.png"
NUM_FOUND = 6  # pictures beside each text
MAX_SEARCHED = 10_000  # because their states stay in memory while they are ranked
PREDICTIONS = "predictions.png"
SHEET_SIDE, FRAME = 160, 2  # side of a picture on the sheet of predictions and width of its frame, in pixels


def _or_warn(draw: Callable[..., None]) -> Callable[..., None]:
    """Make a function that draws one that warns where it fails: a picture that cannot be drawn loses no card."""

    @functools.wraps(draw)
    def try_to_draw(*args: Any, **kwargs: Any) -> None:
        try:
            draw(*args, **kwargs)
        except Exception as error:  # matplotlib and Pillow raise any kind
            logger.warning("%s failed, and its picture is left out: %s", draw.__name__, error)

    return try_to_draw


@dataclass(frozen=True)
class Run:
    """How a model was trained, for its card.

    Args:
        data_args: its task and its data.
        amount: how much data it was trained on, such as "100 pairs".
        base_models: the models that it started from: names on the Hub, folders, or `package:NAME`.
        command: the command line that started the run.
        output_dir: the run's folder, which gives the model its name.
        protocol: how its metrics were measured.
        lora: a sentence about its LoRA adapters, see `describe_lora`; empty if it has none.
        lora_save: how they are saved, "merged" or "adapter".
        phase: its last phase; None in a run without phases.
    """

    data_args: DataArguments
    amount: str
    base_models: list[str]
    command: str
    output_dir: Path
    protocol: EvaluationProtocol
    lora: str = ""
    lora_save: str = "merged"
    phase: Phase | None = None

    def write_card(
        self, results: str, metrics: dict[str, float], pictures: list[tuple[str, str]], example: dict[str, Any] | None
    ) -> None:
        """Write the run's card; see `cards.Card` for the arguments."""
        task, datasets = self.data_args.task, self.data_args.dataset_names
        training = f"fine-tuned for {task.replace('_', ' ')}" if TASKS[task].is_downstream else "pre-trained"
        names = [name_of_model(model) for model in self.base_models]
        start = f"It started from {', '.join(names)}." if names else "It was trained from scratch."
        data = f"{self.amount} of {', '.join(datasets)}"
        phase = self.phase or Phase((self.data_args,))
        Card(
            name=self.output_dir.resolve().name,
            model_class=TASKS[task].model_class,
            task=task,
            result_type=TASKS[task].result_type,
            datasets=phase.dataset_names,
            summary=f"A model of {METHOD}, {training} by `tcl_hf` on {data}. {start}",
            results=results,
            training=f"`{self.command}`; the losses and metrics of the run are in `{METRICS}`. {self.lora}".rstrip()
            + phase.history,
            metrics=metrics,
            protocol=self.protocol,
            base_models=self.base_models,
            pictures=[(file, caption) for file, caption in pictures if (self.output_dir / file).exists()],
            example=example,
            tags=["lora"] if self.lora else [],
            adapter_of=(phase.former or self.base_models[0]) if self.lora and self.lora_save == "adapter" else None,
        ).write(self.output_dir)


@_or_warn
def sample_sheet(records: Sequence[dict], path: Path, columns: int = 5) -> None:
    """Draw the images of records with their first captions as a PNG, five in a row."""
    rows = -(-len(records) // columns)
    figure, axes = _subplots((2.4 * columns, 2.9 * rows), rows, columns)
    for axis in axes.flat:
        axis.axis("off")
    for axis, record in zip(axes.flat, records, strict=False):
        axis.imshow(open_image(record["image"]).convert("RGB"))
        text = textwrap.shorten(record["captions"][0], 78, placeholder="...")
        axis.set_title(textwrap.fill(text, 26), fontsize=8, parse_math=False)
    _save(figure, path, dpi=90)


def results_table(
    metrics: dict[str, float], num_images: int, k: int, baselines: dict[str, dict[str, float]] | None = None
) -> str:
    """A Markdown table of recall in percent: chance, the baselines, and the model by each of its scores.

    Args:
        metrics: those of `evaluate_retrieval`; the table has the scores that they have.
        num_images: number of images that were retrieved from.
        k: number of candidates that were re-ranked.
        baselines: metrics of each baseline, by its name, as `measure_baselines` returns them.
    """
    columns = [f"{way}recall@{at}" for way in ("i2t_", "t2i_", "") for at in (1, 5, 10)]
    chance = {name: chance_recall(num_images, int(name.split("@")[1])) for name in columns}
    rows = {"chance": chance, **(baselines or {}), "this model, by similarity": metrics}
    rows[f"this model, re-ranked by matching (k = {k})"] = _scored_by("reranked", metrics)
    weight = f"{metrics.get('rerank_weight', 0):g}"
    rows[f"this model, combined (k = {k}, weight {weight})"] = _scored_by("combined", metrics)
    lines = [
        f"| recall in % of {num_images} | image to text @1 | @5 | @10 | text to image @1 | @5 | @10 "
        "| mean of both @1 | @5 | @10 |",
        "|---|" + "---|" * len(columns),
    ]
    for name, values in rows.items():
        if values:
            lines.append(" | ".join([f"| {name}", *(f"{values[column]:.2f}" for column in columns)]) + " |")
    return "\n".join(lines)


def _scored_by(score: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics by a score, "reranked" or "combined", under the names of those by similarity."""
    return {name.removeprefix(f"{score}_"): v for name, v in metrics.items() if name.startswith(f"{score}_")}


@_or_warn
def plot_training(lines: list[dict[str, float]], path: Path) -> None:
    """Plot the losses and the recall of the lines of a `metrics.jsonl` as a PNG."""
    figure, ((losses, recall),) = _subplots((10, 3.6), 1, 2)
    for name in ("cma", "imc", "lmi", "itm", "mlm"):
        _plot_values(losses, lines, f"loss_{name}", label=name.upper())
    losses.set(xlabel="step", ylabel="loss", title="Losses")
    losses.legend()
    for prefix, label in (("", "similarity"), ("reranked_", "re-ranked"), ("combined_", "combined")):
        _plot_values(recall, lines, f"{prefix}recall@1", label=label, marker="o")
    recall.set(xlabel="step", ylabel="recall@1 in %", title="Held-out recall, mean of both directions")
    recall.set_ylim(bottom=0)
    if recall.lines:
        recall.legend()
    _save(figure, path, dpi=110)


def write_picture_sheets(
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    folder: Path,
    k: int,
    free_texts: Sequence[str] = (),
    others: Sequence[Sequence[dict]] = (),
) -> list[tuple[str, str]]:
    """Write sheets of the pictures that a model finds for texts; return each file with its caption.

    One sheet is for captions of the records, with the right picture framed. They are spread evenly over the records:
    none is chosen for its result. It searches the records. The other is for the free texts, if there are any. It
    searches the other data too, where each picture is shown once. Both rank by the score of `search_images`.

    Args:
        k: number of candidates by similarity that are ranked anew.
        free_texts: texts that belong to no record.
        others: further data whose pictures are searched for the free texts, such as those to train on. At most
            `MAX_SEARCHED` of each are read, spread evenly.
    """
    num_names = min(8, len(records))
    right = [row * len(records) // num_names for row in range(num_names)]
    texts = [records[row]["captions"][0] for row in right]
    found = search_images(model, processor, records, texts, number=NUM_FOUND, k=k).tolist()
    score = "the combined score" if model.config.itm_weight and model.config.rerank_weight is not None else "similarity"
    picture_sheet(records, texts, found, folder / SHEET, right)
    sheets = [
        (
            SHEET,
            f"Pictures retrieved by {score}, the right one framed. The captions are spread evenly over the split.",
        )
    ]
    if free_texts:
        pictures = different_pictures([records, *others])
        found = search_images(model, processor, pictures, list(free_texts), number=NUM_FOUND, k=k).tolist()
        picture_sheet(pictures, list(free_texts), found, folder / FREE_SHEET)
        which = "those of training among them, " if len(pictures) > len(records) else ""
        caption = f"Pictures that {score} finds among {len(pictures)}, {which}for texts that belong to none of them."
        sheets.append((FREE_SHEET, caption))
    return sheets


def different_pictures(data: Sequence[Sequence[dict]]) -> list[dict]:
    """The records of several data sets, at most `MAX_SEARCHED` of each, without those whose picture occurs before."""
    chosen: dict[Any, dict] = {}
    for records in data:
        for row in range(0, len(records), max(1, -(-len(records) // MAX_SEARCHED))):
            image = records[row]["image"]
            chosen.setdefault(image.get("bytes") or image.get("path"), records[row])
    return list(chosen.values())


@_or_warn
def picture_sheet(
    records: Sequence[dict], texts: list[str], found: list[list[int]], path: Path, right: list[int] | None = None
) -> None:
    """Draw the pictures found for each text in a row, best first, as a PNG.

    Args:
        found: for each text the rows of the records, best first; as many for each.
        right: the row that each text belongs to, whose picture is framed; None if it belongs to none.
    """
    num_images = len(found[0])
    figure, axes = _subplots((1.3 * num_images + 2, 1.3 * len(texts)), len(texts), num_images)
    for row, text in enumerate(texts):
        axes[row, 0].set_ylabel(
            textwrap.fill(text, 18), rotation=0, ha="right", va="center", fontsize=9, parse_math=False
        )
        for axis, image in zip(axes[row], found[row], strict=True):
            axis.imshow(open_image(records[image]["image"]).convert("RGB"))
            axis.set(xticks=[], yticks=[])
            is_right = right is not None and image == right[row]
            for spine in axis.spines.values():
                spine.set(color="tab:green" if is_right else "lightgrey", linewidth=3 if is_right else 1)
    _save(figure, path, dpi=110)


def write_pretraining_report(
    run: Run,
    model: TCLForImageTextRetrieval,
    processor: TCLProcessor,
    records: Sequence[dict],
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]] | None = None,
    num_tuning: int = 0,
    free_texts: Sequence[str] = (),
    others: Sequence[Sequence[dict]] = (),
) -> str:
    """Write curves, picture sheets and model card of pre-training into its folder; return its table of results.

    Args:
        records: the held-out images, with captions.
        metrics: those of `evaluate_retrieval` on them.
        baselines: metrics of the baselines on them, by name; see `measure_baselines`.
        num_tuning: number of samples on which the weight of the combined score was chosen; 0 if it was given.
        free_texts: texts for which a sheet shows the pictures that the model finds.
        others: further data whose pictures are searched for them.
    """
    protocol, folder = run.protocol, run.output_dir
    k = protocol.k or 0
    table = results_table(metrics, len(records), k, baselines)
    plot_training(read_metrics(folder / METRICS), folder / CURVES)
    sheets = write_picture_sheets(model, processor, records, folder, k, free_texts, others)
    how = [
        f"The model was measured at the end of the run on the split `{protocol.split}`, which it was not trained on, "
        f"with {_in_words(run.data_args.eval_captions)} per image. Similarity is the cosine of the features of both "
        "encoders.",
        *_explained_scores(metrics, k, num_tuning),
        "The images were prepared by the PIL backend of the image processor.",
    ]
    if baselines:
        how.append("The baselines are linear maps that were fitted to the training data of the run.")
    text = textwrap.fill(" ".join(how), 120, break_long_words=False, break_on_hyphens=False)
    results = f"{text}\n\n{table}"
    pictures = [(CURVES, "The losses and the recall during the run."), *sheets]
    names = ("recall@", "reranked_recall@", "combined_recall@")
    mean_recall = {name: value for name, value in metrics.items() if name.startswith(names)}
    labels = [records[row]["captions"][0] for row in range(min(4, len(records)))]
    run.write_card(results, mean_recall, pictures, example=records[0] | {"captions": labels})
    return table


def _in_words(captions: int | None) -> str:
    """A number of captions, all of them if None, for a sentence."""
    if captions is None:
        return "all captions"
    return "one caption" if captions == 1 else f"{captions} captions"


def _explained_scores(metrics: dict[str, float], k: int, num_tuning: int) -> list[str]:
    """Sentences about the scores other than similarity that the metrics have."""
    sentences = []
    if _scored_by("reranked", metrics):
        sentences.append(f"Re-ranking scores the {k} most similar candidates of each query by the matching head alone.")
    if _scored_by("combined", metrics):
        chosen = f"was chosen on {num_tuning} samples that were cut off from the training data"
        sentences.append(
            "The combined score of a candidate is its similarity, divided by the temperature, plus "
            f"{metrics['rerank_weight']:g} times the log-odds of matching; this weight "
            f"{chosen if num_tuning else 'was given'}."
        )
    return sentences


@_or_warn
def prediction_sheet(records: Sequence[dict], predictions: list[dict], path: Path, columns: int = 6) -> None:
    """Draw pictures with the text about them and the prediction, as a PNG; right ones are framed green.

    The records are drawn with a fixed seed: none is chosen for its result. A grounded phrase shows its point.

    Args:
        records: the records that were evaluated.
        predictions: those of an evaluator; several of one record share its `image_id`.
    """
    by_id = {record["image_id"]: record for record in records}
    one_each = len(predictions) == len(records)
    chosen = random.Random(0).sample(range(len(predictions)), min(2 * columns, len(predictions)))
    figure, axes = _subplots((1.9 * columns, 5.2), 2, columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, number in zip(axes.flat, chosen, strict=False):
        prediction = predictions[number]
        record = records[number] if one_each else by_id[prediction["image_id"]]
        pictures = [open_image(image).convert("RGB") for image in record.get("images") or [record["image"]]]
        axis.imshow(np.concatenate([np.asarray(_framed(picture)) for picture in pictures], axis=1))
        if "point" in prediction:
            axis.plot(*_on_sheet(prediction["point"], pictures[0].size), marker="+", color="red", markersize=12)
        text, result, color = _caption_of(prediction, record)
        axis.set_title(textwrap.fill(text, 24), fontsize=8, parse_math=False)
        axis.text(
            0.5,
            -0.08,
            result,
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color=color,
            parse_math=False,
        )
    _save(figure, path, dpi=110)


def _framed(picture: Image.Image) -> Image.Image:
    """A picture at the size of the sheet, on grey where it is not square."""
    return ImageOps.expand(ImageOps.pad(picture, (SHEET_SIDE, SHEET_SIDE), color="lightgrey"), FRAME, "lightgrey")


def _on_sheet(point: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    """Where a point of a picture is after `_framed`."""
    scale = SHEET_SIDE / max(size)
    return tuple((SHEET_SIDE - scale * side) / 2 + scale * at + FRAME for side, at in zip(size, point, strict=True))


def _caption_of(prediction: dict, record: dict) -> tuple[str, str, str]:
    """The text about a picture, the result below it, and the colour of the result."""
    if "phrase" in prediction:
        return prediction["phrase"], "", "black"
    text = record.get("question") or record["captions"][0]
    predicted = prediction.get("answer") or prediction["label"]
    true = (record.get("answers") or [record.get("label")])[0]
    if predicted == true:
        return text, predicted, "tab:green"
    return text, f"{predicted} ({true})", "tab:red"


def task_table(metrics: dict[str, float], protocol: EvaluationProtocol) -> str:
    """A Markdown table of a task's metrics, under a sentence with the protocol of their measurement."""
    rows = [f"| {name} | {value:.2f} |" for name, value in metrics.items() if name not in ("step", "epoch")]
    return "\n".join([str(protocol), "", "| metric | value |", "|---|---|", *rows])


@_or_warn
def plot_task(lines: list[dict[str, float]], metric: str, path: Path) -> None:
    """Plot the loss and one metric of the lines of a `metrics.jsonl` as a PNG."""
    figure, ((loss, measured),) = _subplots((9, 3.4), 1, 2)
    _plot_values(loss, lines, "loss")
    loss.set(xlabel="step", ylabel="loss", title="Training loss")
    _plot_values(measured, lines, metric, marker="o")
    measured.set(xlabel="step", ylabel=metric, title="Held-out data")
    _save(figure, path, dpi=110)


def write_finetuning_report(run: Run, metrics: dict[str, float], metric: str, records: Sequence[dict] | None) -> str:
    """Write curve and model card of a fine-tuning run into its folder; return its table of results.

    Args:
        metrics: the last line of the run's `metrics.jsonl`; the table shows those of the best evaluation.
        metric: the one that the model was kept by; the first one if empty.
        records: the held-out data, of which the card's widget shows one; None if nothing was evaluated.
    """
    lines = read_metrics(run.output_dir / METRICS)
    evaluations = [line for line in lines if "loss" not in line]
    metric = metric or next((name for name in metrics if name not in ("step", "epoch")), "loss")
    best = max(evaluations, key=lambda line: line.get(metric, -math.inf), default=metrics)
    plot_task(lines, metric, run.output_dir / CURVES)
    table = task_table(best, run.protocol)
    pictures = [(CURVES, "The loss and the metric during the run.")]
    run.write_card(table, best if records else {}, pictures, example=records[0] if records else None)
    return table


def _subplots(size: tuple[float, float], rows: int, columns: int) -> tuple["Figure", Any]:
    """A figure of this width and height in inches, and its axes as an array."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves and picture sheets need matplotlib: pip install matplotlib.") from error
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: "Figure", path: Path, dpi: int) -> None:
    """Write a figure as a PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    replace_file(path, picture.getvalue())


def _plot_values(axis: "Axes", lines: list[dict[str, float]], name: str, **style: Any) -> None:
    """Plot a value of the lines of a `metrics.jsonl` over the steps, if a line has it."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        axis.plot(*zip(*points, strict=True), **style)
