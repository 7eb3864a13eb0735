"""Where image-text pairs come from: one entry, `load_pairs`, and one record for every source.

A record has `image` (undecoded: bytes, a path, or both), `captions` (a list) and `image_id`. Sources go through
`datasets`, map-style or streaming.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Value
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Sampler

from .openmoji import load_openmoji
from .tokenization_tcl import TCLTokenizer, clean_caption

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "pixel_values")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence", "json")
ID_COLUMNS = ("image_id", "__key__", "id", "key", "cocoid", "imgid", "filename")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)


_VALIDATION = ("validation", "val", "dev")
# What the files of some data sets call a split. Karpathy's "restval" are COCO's validation images used for training.
SPLIT_NAMES = {
    **dict.fromkeys(_VALIDATION, _VALIDATION),
    "train": ("train", "restval"),
    "test": ("test", "testA", "testB"),
}


class DataError(ValueError):
    """The data can not be used as it is; the message says what, where, and the remedy."""


def load_pairs(
    source: str | list[str],
    split: str = "train",
    *,
    streaming: bool = False,
    image_root: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Dataset | IterableDataset:
    """Load image-text pairs as records `image`, `captions`, `image_id`.

    Args:
        source: what to load, or a list of such:
            "openmoji", the embedded default; an ALBEF-style JSON list of `{"image": path, "caption": text or
            texts}`; the JSON of Karpathy's splits; WebDataset tars (a file, a pattern or a folder of `.tar`); parquet
            (likewise); a folder of images with `metadata.csv` or `.jsonl`, or one saved by `datasets`; or a data set
            on the Hub.
        split: the split of it. Of the files in a folder, those whose names begin with it; for "train" all that do
            not begin with the name of another split, if none does. A file named outright has no splits, except
            Karpathy's: there "train" includes "restval", and "validation", "val" and "dev" are the same.
        streaming: read while training instead of before.
        image_root: folder to which the paths of a JSON list are relative; its own folder if None.
        image_column, caption_column: the columns to use, where their names are not the usual ones.

    Raises:
        DataError: if there is nothing at the source, no data in it, or no image or caption column.
    """
    if isinstance(source, list):
        if not source:
            raise DataError("No data was named: give a source, for example openmoji.")
        parts = [
            load_pairs(
                one,
                split,
                streaming=streaming,
                image_root=image_root,
                image_column=image_column,
                caption_column=caption_column,
            )
            for one in source
        ]
        return (
            parts[0]
            if len(parts) == 1
            else datasets.concatenate_datasets([part.select_columns(list(FEATURES)) for part in parts])
        )
    if source == "openmoji":  # these are records already
        pairs = load_openmoji(split)
        return pairs.to_iterable_dataset() if streaming else pairs
    pairs = open_source(source, split, streaming=streaming, image_root=image_root)
    if isinstance(pairs, Dataset) and len(pairs) == 0:
        raise DataError(f"{source} holds no pairs in its split '{split}'.")
    return _as_records(pairs, source, image_column, caption_column)


def open_source(
    source: str, split: str, *, streaming: bool = False, image_root: str | None = None
) -> Dataset | IterableDataset:
    """Open files, a folder or a data set on the Hub as it is, with the columns it has.

    Raises:
        DataError: if there is nothing at the source, or it can not be read.
    """
    try:
        return _open_files(source, split, streaming, image_root)
    except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source} could not be loaded (split '{split}'): {reason}") from error


def _open_files(source: str, split: str, streaming: bool, image_root: str | None) -> Dataset | IterableDataset:
    files = _files(source, split)
    kinds = {Path(file).suffix for file in files}
    if kinds == {".json"}:
        pairs = _read_json_lists(files, split, image_root)
        return pairs.to_iterable_dataset() if streaming else pairs
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "dataset_dict.json")):
        pairs = datasets.load_from_disk(source)[split]
        return pairs.to_iterable_dataset() if streaming else pairs
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "state.json")):
        pairs = datasets.load_from_disk(source)
        return pairs.to_iterable_dataset() if streaming else pairs
    if kinds == {".tar"}:
        return datasets.load_dataset("webdataset", data_files={split: files}, split=split, streaming=streaming)
    if kinds == {".parquet"}:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    if os.path.isdir(source):
        return datasets.load_dataset("imagefolder", data_dir=source, split=split, streaming=streaming)
    if os.path.exists(source) or glob.has_magic(source) or source.startswith((".", "/", "~")):
        raise DataError(
            f"{source} is no data that can be read here: give a JSON list, tar or parquet files, a folder of them, "
            "or the name of a data set on the Hub."
        )
    return datasets.load_dataset(source, split=split, streaming=streaming)


def _files(source: str, split: str) -> list[str]:
    """The files a source names: itself, those of its pattern, or the tars or parquets of its folder."""
    if os.path.isfile(source):
        return [source]
    if glob.has_magic(source):
        return sorted(glob.glob(source))
    for pattern in ("*.tar", "*.parquet"):
        found = sorted(glob.glob(os.path.join(glob.escape(source), pattern)))
        chosen = [file for file in found if Path(file).name.startswith(split)]
        if not chosen and split == "train":
            chosen = [file for file in found if not Path(file).name.startswith(("val", "dev", "test"))]
        if found and not chosen:
            raise DataError(f"{source} has no files of a split '{split}': their names must begin with it.")
        if chosen:
            return chosen
    return []


def _read_json_lists(files: list[str], split: str, image_root: str | None) -> Dataset:
    """Read ALBEF-style lists; a row without image or caption stays, to be skipped and listed when its turn comes."""
    columns: dict[str, list] = {"image": [], "captions": [], "image_id": []}
    for file in files:
        try:
            rows = json.loads(Path(file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not a JSON list: {error}.") from error
        if isinstance(rows, dict) and isinstance(rows.get("images"), list):
            rows = _karpathy_rows(rows["images"], split, file)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file} is not a list of objects with 'image' and 'caption'.")
        root = Path(image_root) if image_root is not None else Path(file).parent
        for number, row in enumerate(rows):
            path = row.get("image")
            caption = row.get("caption")
            captions = caption if isinstance(caption, list) else [caption]
            columns["image"].append({"bytes": None, "path": str(root / path)} if path else None)
            columns["captions"].append([text for text in captions if isinstance(text, str)])
            columns["image_id"].append(str(row.get("image_id", path or f"{file}:{number}")))
    return Dataset.from_dict(columns, features=FEATURES)


def _karpathy_rows(images: list[dict], split: str, file: str) -> list[dict]:
    """The images of one of Karpathy's splits, as rows of an ALBEF-style list."""
    names = SPLIT_NAMES.get(split, (split,))
    rows = []
    for number, image in enumerate(images, 1):
        try:
            if image["split"] in names:
                path = os.path.join(image.get("filepath", ""), image["filename"])
                captions = [sentence["raw"] for sentence in image["sentences"]]
                image_id = image.get("cocoid", image.get("imgid", path))
                rows.append({"image": path, "caption": captions, "image_id": image_id})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}, image {number}, is not as in Karpathy's splits ({type(error).__name__}: {error}): it needs "
                "'filename', 'split' and 'sentences' with 'raw'."
            ) from error
    return rows


def _as_records(
    pairs: Dataset | IterableDataset, source: str, image_column: str | None, caption_column: str | None
) -> Dataset | IterableDataset:
    """Rename the columns to those of a record, leave images undecoded, and make captions lists."""
    columns = pairs.column_names
    if columns is None:  # a stream that has not been looked at
        columns = list(next(iter(pairs)))
    image = _find_column(columns, image_column, IMAGE_COLUMNS, "image", source)
    caption = _find_column(columns, caption_column, CAPTION_COLUMNS, "caption", source)
    image_id = next((name for name in ID_COLUMNS if name in columns), None)
    complete = partial(_complete, image=image, caption=caption, image_id=image_id)
    pairs = pairs.cast_column(image, datasets.Image(decode=False))
    if isinstance(pairs, IterableDataset):
        return pairs.map(complete, with_indices=True, remove_columns=columns, features=FEATURES)
    # The images stay where they are: only the other columns are written anew.
    others = pairs.remove_columns([name for name in columns if name not in (caption, image_id)])
    words = others.map(
        complete,
        with_indices=True,
        remove_columns=others.column_names,
        features=datasets.Features({name: FEATURES[name] for name in ("captions", "image_id")}),
        desc="Reading captions",
    )
    images = pairs.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    return datasets.concatenate_datasets([images, words], axis=1)


def _find_column(columns: list[str], asked: str | None, usual: tuple[str, ...], what: str, source: str) -> str:
    candidates = (asked,) if asked is not None else usual
    for name in candidates:
        if name in columns:
            return name
    raise DataError(
        f"{source} has no {what} column among {', '.join(columns)} (looked for {', '.join(candidates)}): "
        f"name it with {what}_column."
    )


def _complete(record: dict, index: int, image: str, caption: str, image_id: str | None) -> dict:
    """A record of named columns: its captions as a list, and its id, or else its number, as text."""
    captions = record[caption]
    captions = list(captions) if isinstance(captions, list | tuple) else [captions]
    # img2dataset's .json, or a list of {"raw": text} as in Karpathy's splits
    texts = [text.get("caption", text.get("raw")) if isinstance(text, dict) else text for text in captions]
    number = record.get(image_id) if image_id else None
    complete = {
        "captions": [text for text in texts if isinstance(text, str)],
        "image_id": str(index if number is None else number),
    }
    return complete | {"image": record[image]} if image in record else complete


def captions_of(pairs: Dataset | IterableDataset) -> Iterator[str]:
    """All captions, without reading the images."""
    for record in pairs.select_columns(["captions"]):
        yield from record["captions"] or ()


def train_tokenizer(captions: Iterable[str], vocab_size: int = 30522) -> TCLTokenizer:
    """Train a WordPiece tokenizer on cleaned captions.

    Args:
        captions: texts, cleaned here.
        vocab_size: at most so many tokens, the special ones included.

    Raises:
        DataError: if there are no captions.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [clean_caption(caption) for caption in captions]
    # The trainer numbers inner characters in an order that differs between runs, and breaks ties by number: naming
    # them first makes the vocabulary the same each time.
    characters = sorted({character for text in texts for character in tokenizer.normalizer.normalize_str(text)} - {" "})
    if not characters:
        raise DataError("There are no captions to train a tokenizer on: name one, or check the caption column.")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"##{character}" for character in characters)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = sorted(set(tokenizer.get_vocab()) - set(special))
    return TCLTokenizer({piece: number for number, piece in enumerate([*special, *pieces])})


@dataclass
class SkippedSamples:
    """Counts the samples that could not be used and lists them, one JSON line each, also from worker processes.

    Args:
        path: the list's file; None keeps none.
        max_share: the run stops when a larger share of the samples seen is bad.
    """

    path: str | os.PathLike | None = None
    max_share: float = 0.1
    min_seen: int = 100
    last: str = field(default="none yet", init=False)
    _seen: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _skipped: Any = field(default_factory=lambda: Value("q", 0), repr=False)

    @property
    def count(self) -> int:
        return self._skipped.value

    def saw(self, number: int) -> None:
        with self._seen.get_lock():
            self._seen.value += number

    def add(self, image_id: object, reason: str) -> None:
        """Note one bad sample and why it is bad."""
        self.last = f"{image_id}: {reason}"
        with self._skipped.get_lock():
            self._skipped.value += 1
            if self.path is not None:
                line = json.dumps({"image_id": str(image_id), "reason": reason}, ensure_ascii=False)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def check(self) -> None:
        """Stop the run if too much of the data is bad.

        Raises:
            DataError: with the share, and where the samples are listed.
        """
        seen, skipped = self._seen.value, self._skipped.value
        if seen >= self.min_seen and skipped > self.max_share * seen:
            raise DataError(
                f"{skipped} of {seen} samples could not be used, more than the share of {self.max_share:g} that "
                f"max_bad_share allows; they are listed in {self.path}."
            )


@dataclass(frozen=True)
class Visit:
    """One visit of a sample: all its random choices follow from these numbers, whichever process makes them."""

    seed: int
    epoch: int
    index: int

    def entropy(self) -> int:
        """A seed for the choices of this visit."""
        mixed = 0
        for number in (self.seed, self.epoch, self.index):  # splitmix64's finaliser on each
            mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 31
        return mixed


class VisitSampler(Sampler[Visit]):
    """The visits of one epoch, shuffled by seed and epoch; `start` skips those of a run that goes on."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self.epoch, self.start = 0, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its visits are done."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Visit]:
        generator = torch.Generator().manual_seed(Visit(self.seed, self.epoch, -1).entropy() >> 1)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for index in order[self.start :]:
            yield Visit(self.seed, self.epoch, index)


class VisitedPairs(torch.utils.data.Dataset):
    """Records of a map-style data set, looked up by visit."""

    def __init__(self, pairs: Dataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, visit: Visit) -> dict:
        return {**self.pairs[visit.index], "visit": visit}


class SharedImages(torch.utils.data.Dataset):
    """Records by image: an item holds as `records` all that are about the same one (or the same several).

    Images are the same where their path is, or without a path their bytes.
    """

    def __init__(self, records: Dataset):
        self.records = records
        rows: dict[tuple, list[int]] = {}
        column = "images" if "images" in records.column_names else "image"
        for row, sources in enumerate(records.select_columns([column])[column]):
            sources = sources if isinstance(sources, list) else [sources]
            rows.setdefault(tuple(map(_identity, sources)), []).append(row)
        self.groups = list(rows.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict:
        columns = self.records[self.groups[index]]
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"image_id": records[0].get("image_id"), "records": records}


def _identity(image: dict) -> str | bytes:
    return image.get("path") or hashlib.blake2b(image["bytes"], digest_size=16).digest()


class StreamedPairs(torch.utils.data.IterableDataset):
    """Records of a stream with their visits, shuffled by shard and within a window that moves over the stream.

    `datasets` splits the shards over workers.
    """

    def __init__(self, pairs: IterableDataset, seed: int, window: int = 1000):
        self.pairs, self.seed, self.epoch = pairs.shuffle(seed=seed, buffer_size=window), seed, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration; `start` is not used: a stream is read again up to there."""
        self.epoch = epoch
        self.pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, record in enumerate(self.pairs):
            yield {**record, "visit": Visit(self.seed, self.epoch, first + number * step)}
