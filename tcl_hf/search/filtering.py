"""Keep the pairs of a data set whose image and text belong together, by similarity or by matching.

A pair is an image with one of its texts. A record keeps the texts that are kept, and is left out if none is.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.captions import usable_captions
from ..data.images import IMAGE_ERRORS
from ..data.pairs import load_pairs
from ..data.skipped import SkippedSamples
from ..models.modeling_tcl import MATCHES
from ..models.whole_files import replace_file
from .encoding import AHEAD, in_threads
from .indexing import SKIPPED
from .pair_files import FORMATS, pair_file
from .ranking import NUM_READERS, SearchModel, check_can_match, read_rgb
from .storage import SearchError

PROGRESS = "filter.json"  # the plan, and the numbers of each file that is whole
SCORES = ("similarity", "matching")
_FIRST_PASS = "scores"  # folder of the scores of all pairs, one file for each part of the source


@dataclass(frozen=True)
class FilterPlan:
    """The pairs to keep, and the files that they are written to.

    Args:
        source: a source of `load_pairs`, and its `split`.
        min_similarity: lowest cosine similarity of a pair that is kept.
        min_matching: lowest probability that a pair matches.
        keep_share: share of the pairs to keep, the best ones, in place of thresholds.
        by: what the best ones are chosen by, "similarity" or "matching".
        format: "tar" (WebDataset) or "parquet".
        records_per_file: records of the source in a part, of which a file holds those that are kept.
    """

    source: str
    split: str = "train"
    min_similarity: float | None = None
    min_matching: float | None = None
    keep_share: float | None = None
    by: str = "similarity"
    format: str = "tar"
    records_per_file: int = 10_000

    def check(self, model: SearchModel) -> None:
        """Refuse a plan that contradicts itself, or that the model cannot carry out.

        Raises:
            SearchError: with the argument and the remedy.
        """
        thresholds = self.min_similarity is not None or self.min_matching is not None
        if thresholds == (self.keep_share is not None):
            raise SearchError("Say what to keep: either min_similarity or min_matching, or keep_share.")
        if self.keep_share is not None and not 0 < self.keep_share <= 1:
            raise SearchError(f"keep_share must be above 0 and at most 1, got {self.keep_share}.")
        if self.by not in SCORES or self.format not in FORMATS:
            raise SearchError(f"by={self.by} must be one of {SCORES}, and format={self.format} one of {FORMATS}.")
        if self.records_per_file < 1:
            raise SearchError(f"records_per_file must be at least 1, got {self.records_per_file}.")
        if self.min_matching is not None or (self.keep_share is not None and self.by == "matching"):
            check_can_match(model)


@dataclass
class FilterResult:
    """The numbers of a run.

    Args:
        records, pairs: records that were read, and pairs that were scored.
        kept_records, kept_pairs: those that were kept.
        skipped: records that cannot be used.
        files: files that were written.
    """

    records: int = 0
    pairs: int = 0
    kept_records: int = 0
    kept_pairs: int = 0
    skipped: int = 0
    files: int = 0


@dataclass
class Scored:
    """A record with the scores of its texts, or with the reason why it cannot be used."""

    record: dict[str, Any]
    texts: list[str]
    similarity: list[float]
    matching: list[float | None]
    reason: str | None = None


class PairScorer:
    """Scores the pairs of records: threads decode, and the model encodes a batch of images with all their texts.

    Args:
        model: the model.
        batch_size: images in a forward.
    """

    def __init__(self, model: SearchModel, batch_size: int):
        self.model, self.batch_size = model, batch_size

    def scored(self, records: Iterable[dict[str, Any]]) -> Iterator[Scored]:
        """The records with their scores, in their order."""
        with ThreadPoolExecutor(NUM_READERS) as threads:
            decoded = in_threads(self._decode, records, threads, AHEAD * self.batch_size)
            while batch := list(islice(decoded, self.batch_size)):
                self._score([(one, pixels) for one, pixels in batch if pixels is not None])
                yield from (one for one, _ in batch)

    def _decode(self, record: dict[str, Any]) -> tuple[Scored, Tensor | None]:
        """A record without scores, and its pixels (3, H, W) if it can be used."""
        texts = usable_texts(record, self.model)
        scored = Scored(record, texts, [], [])
        try:
            if not texts:
                raise ValueError("no caption")
            return scored, self.model.pixel_values(read_rgb(record["image"]))
        except IMAGE_ERRORS as error:
            scored.texts, scored.reason = [], f"{type(error).__name__}: {error}"
            return scored, None

    @torch.no_grad()
    def _score(self, batch: list[tuple[Scored, Tensor]]) -> None:
        """Set the similarities and the probabilities that they match of all texts of a batch."""
        if not batch:
            return
        model, device = self.model, self.model.device
        states, features = model.encode_images(torch.stack([pixels for _, pixels in batch]))
        texts = [text for one, _ in batch for text in one.texts]
        image_of = torch.tensor([row for row, (one, _) in enumerate(batch) for _ in one.texts], device=device)
        tokens = model.processor(text=texts, return_tensors="pt").to(device)
        mask = tokens["attention_mask"]
        text_states = model.tcl.encode_text(tokens["input_ids"], mask)
        similarity = (features[image_of] * model.tcl.text_features(text_states, mask)).sum(-1).tolist()
        matching: list[float | None] = [None] * len(texts)
        if model.can_match:
            images = model.tcl.text_model.project_images(states)
            logits = model.model.match(text_states, mask, images, image_of).float()
            matching = logits.softmax(-1)[:, MATCHES].tolist()
        of_pairs = iter(zip(similarity, matching, strict=True))
        for one, _ in batch:
            own = list(islice(of_pairs, len(one.texts)))
            one.similarity, one.matching = [pair[0] for pair in own], [pair[1] for pair in own]


def usable_texts(record: dict[str, Any], model: SearchModel) -> list[str]:
    """The captions of a record that the model can read, as they are written."""
    return [text for text in record.get("captions") or () if _is_usable(text, model.processor.clean_caption)]


def _is_usable(text: Any, clean: Callable[[str], str]) -> bool:
    try:
        return bool(usable_captions({"captions": [text]}, clean))
    except ValueError:
        return False


class PairFilter:
    """A run that keeps the good pairs of a source, and goes on where an earlier one was stopped.

    The source is read in parts. `filter.json` in the output lists the parts that are whole, so that a run that was
    killed makes at most one again. For `keep_share` all pairs are scored in a first pass. Its scores are kept, so that
    the share is exact and no image is encoded twice; the second pass reads the source again, and writes.

    Args:
        plan: what to keep.
        output: folder of the files.
        model: the model.
        batch_size: images in a forward.
        progress: show a progress bar.

    Raises:
        SearchError: if the plan contradicts itself, or the folder holds the output of another plan.
    """

    def __init__(
        self,
        plan: FilterPlan,
        output: str | os.PathLike,
        model: SearchModel,
        batch_size: int = 32,
        progress: bool = True,
    ):
        plan.check(model)
        self.plan, self.folder, self.progress = plan, Path(output), progress
        self.scorer = PairScorer(model, batch_size)
        made_by = asdict(plan) | {"weights": model.weights()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / PROGRESS
            self.state: dict[str, Any] = {"plan": made_by, "parts": [], "is_done": False}
            if file.exists():
                self.state = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SearchError(f"{output} cannot be used as the output ({error}): name another folder.") from error
        if self.state["plan"] != made_by:
            differs = [name for name, value in made_by.items() if self.state["plan"].get(name) != value]
            raise SearchError(
                f"{output} holds the output of another run, which differs in {', '.join(differs)}: name another "
                "folder, or remove this one."
            )
        self._save()

    def run(self) -> FilterResult:
        """Write the pairs that are kept, and return the numbers."""
        chosen = None if self.plan.keep_share is None or self.state["is_done"] else self._chosen(self._score_all())
        if not self.state["is_done"]:
            first = len(self.state["parts"])
            for number, records in self._parts(first, "Filtering"):
                scored = self.scorer.scored(records) if chosen is None else self._scored_before(number, records)
                self._write(number, scored, chosen)
            self.state["is_done"] = True
            self._save()
        self._list_skipped()
        parts = self.state["parts"]
        total = {name: sum(part[name] for part in parts) for name in ("records", "pairs", "kept_records", "kept_pairs")}
        skipped, files = sum(len(part["skipped"]) for part in parts), sum(part["kept_records"] > 0 for part in parts)
        return FilterResult(**total, skipped=skipped, files=files)

    def _parts(self, first: int, name: str) -> Iterator[tuple[int, list[dict[str, Any]] | Iterator[dict[str, Any]]]]:
        """The parts of the source from a number on: the number, and the records, to be read before the next part."""
        size = self.plan.records_per_file
        stream: Any = load_pairs(self.plan.source, self.plan.split, streaming=True)
        records = iter(stream.skip(first * size) if first else stream)
        with tqdm(desc=name, unit="record", initial=first * size, disable=not self.progress) as bar:

            def counted(part: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
                for record in part:
                    yield record
                    bar.update()

            number = first
            while (record := next(records, None)) is not None:
                yield number, counted(_with_first(record, islice(records, size - 1)))
                number += 1

    def _score_all(self) -> list[list[dict[str, Any]]]:
        """The scores of all records, part by part."""
        folder = self.folder / _FIRST_PASS
        folder.mkdir(exist_ok=True)
        done = 0
        while _scores_file(folder, done).exists():
            done += 1
        if not (folder / "done").exists():
            for number, records in self._parts(done, "Scoring"):
                lines = [
                    {"similarity": one.similarity, "matching": one.matching, "reason": one.reason}
                    for one in self.scorer.scored(records)
                ]
                self._replace(_scores_file(folder, number), json.dumps(lines))
                done = number + 1
            self._replace(folder / "done", "")
        return [json.loads(_scores_file(folder, number).read_text()) for number in range(done)]

    def _chosen(self, parts: list[list[dict[str, Any]]]) -> list[np.ndarray]:
        """For each part, which of its pairs are kept (pairs of the part,): exactly the share of all, the best ones."""
        sizes = [sum(len(line["similarity"]) for line in part) for part in parts]
        scores = np.array([score for part in parts for line in part for score in line[self.plan.by]], dtype=np.float64)
        number = round((self.plan.keep_share or 0) * len(scores))
        is_kept = np.zeros(len(scores), dtype=bool)
        is_kept[np.argsort(-scores, kind="stable")[:number]] = True
        return np.split(is_kept, np.cumsum(sizes)[:-1])

    def _scored_before(self, number: int, records: Iterable[dict[str, Any]]) -> Iterator[Scored]:
        """The records of a part with the scores of the first pass."""
        lines = json.loads(_scores_file(self.folder / _FIRST_PASS, number).read_text())
        for record, line in zip(records, lines, strict=True):
            texts = usable_texts(record, self.scorer.model) if line["reason"] is None else []
            yield Scored(record, texts, line["similarity"], line["matching"], line["reason"])

    def _write(self, number: int, scored: Iterable[Scored], chosen: list[np.ndarray] | None) -> None:
        """Write the records of a part that are kept, and note that the part is whole."""
        part: dict[str, Any] = {"records": 0, "pairs": 0, "kept_records": 0, "kept_pairs": 0, "skipped": []}
        path = self.folder / f"{number:05d}.{self.plan.format}"
        try:
            with pair_file(path, self.plan.format) as add:
                for one in scored:
                    start = part["pairs"]
                    part["records"] += 1
                    part["pairs"] += len(one.texts)
                    if one.reason is not None:
                        part["skipped"].append([str(one.record.get("image_id")), one.reason])
                    if chosen is not None:
                        kept = chosen[number][start : part["pairs"]].nonzero()[0].tolist()
                    else:
                        kept = [row for row in range(len(one.texts)) if self._is_good(one, row)]
                    if kept:
                        part["kept_records"] += 1
                        part["kept_pairs"] += len(kept)
                        values = {name: [getattr(one, name)[row] for row in kept] for name in ("texts", *SCORES)}
                        add(part["kept_records"] - 1, one.record, **values)
        except OSError as error:
            raise self._not_written(path, error) from error
        self.state["parts"].append(part)
        self._save()

    def _is_good(self, one: Scored, row: int) -> bool:
        limits = ((self.plan.min_similarity, one.similarity[row]), (self.plan.min_matching, one.matching[row]))
        return all(limit is None or (score is not None and score >= limit) for limit, score in limits)

    def _list_skipped(self) -> None:
        """List the records that cannot be used."""
        file = self.folder / SKIPPED
        file.unlink(missing_ok=True)
        skipped = SkippedSamples(file)
        for part in self.state["parts"]:
            for image_id, reason in part["skipped"]:
                skipped.add(image_id, reason)

    def _save(self) -> None:
        self._replace(self.folder / PROGRESS, json.dumps(self.state, indent=1) + "\n")

    def _replace(self, file: Path, content: str) -> None:
        try:
            replace_file(file, content)
        except OSError as error:
            raise self._not_written(file, error) from error

    def _not_written(self, file: Path, error: OSError) -> SearchError:
        return SearchError(
            f"{file} cannot be written ({error.strerror or error}): what was written before it stays. Make space, and "
            "run the same command again, which goes on there."
        )


def _scores_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"


def _with_first(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest
