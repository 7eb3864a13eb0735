"""Where image-text pairs come from: one entry, `load_pairs`, and one record for every source.

A record has `image` (undecoded: bytes, a path, or both), `captions` (a list) and `image_id`. Sources go through
`datasets`, map-style or streaming.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import Array, Value
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Sampler

from .openmoji import load_openmoji
from .tokenization_tcl import TCLTokenizer, clean_caption

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "pixel_values")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "sentence", "json")
ID_COLUMNS = ("image_id", "__key__", "id", "key", "cocoid", "imgid", "filename")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("string"),
    }
)


MAX_CHARACTERS = 10_000  # of a caption; far more than the words that are kept of it
NOT_UTF8 = "\ufffd"  # stands where bytes of a caption could not be decoded
_JSON_CHUNK = 2**20  # characters read at once
_JSON_LONGEST_ROW = 2**26  # where this many do not make a row, the file is broken
_WHITE_SPACE = re.compile(r"\s*")
_WORD = r"[^\s/-]*[\pL\pN][^\s/-]*"  # of a cleaned caption, as RE2 writes it

_VALIDATION = ("validation", "val", "dev")
# What the files of some data sets call a split. Karpathy's "restval" are COCO's validation images used for training.
SPLIT_NAMES = {
    **dict.fromkeys(_VALIDATION, _VALIDATION),
    "train": ("train", "restval"),
    "test": ("test", "testA", "testB"),
}


_WORKERS, _ID_BYTES = 128, 256  # notes on the samples that workers have begun


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
        return _as_stream(pairs) if streaming else pairs
    tars = [file for file in _files(source, split) if file.endswith(".tar")]
    if tars:
        with _load_errors(source, split):
            return _read_tars(source, tars, streaming, image_column, caption_column)
    pairs = open_source(source, split, streaming=streaming, image_root=image_root)
    if isinstance(pairs, Dataset) and len(pairs) == 0:
        raise DataError(f"{source} holds no pairs in its split '{split}'.")
    if pairs.features == FEATURES and image_column is None and caption_column is None:
        return pairs  # records already, those of a JSON list for instance
    return _as_records(pairs, source, image_column, caption_column)


def open_source(
    source: str, split: str, *, streaming: bool = False, image_root: str | None = None
) -> Dataset | IterableDataset:
    """Open files, a folder or a data set on the Hub as it is, with the columns it has.

    Raises:
        DataError: if there is nothing at the source, or it can not be read.
    """
    with _load_errors(source, split):
        return _open_files(source, split, streaming, image_root)


@contextmanager
def _load_errors(source: str, split: str) -> Iterator[None]:
    """Raise what goes wrong while a source is loaded as one sentence."""
    try:
        yield
    except (OSError, KeyError, ValueError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            cause = error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(f"{source} could not be loaded (split '{split}'): {reason}") from error


def _as_stream(pairs: Dataset) -> IterableDataset:
    """A stream of a table, in shards that processes and workers can divide among themselves."""
    return pairs.to_iterable_dataset(num_shards=min(max(len(pairs) // 1000, 1), 1024))


def _read(generator: Callable[..., Iterator[dict]], files: list[str], streaming: bool, **options: Any):
    """Records that a generator makes of files, one after another: a stream, or a table in the cache of `datasets`."""
    if streaming:
        return IterableDataset.from_generator(generator, features=FEATURES, gen_kwargs={"files": files, **options})
    # A file that has changed since is no longer the one in the cache.
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files))
    options = {"files": tuple(map(os.path.abspath, files)), "stamps": stamps, **options}
    if next(generator(**options), None) is None:
        return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    return Dataset.from_generator(generator, features=FEATURES, gen_kwargs=options)


def _open_files(source: str, split: str, streaming: bool, image_root: str | None) -> Dataset | IterableDataset:
    files = _files(source, split)
    kinds = {Path(file).suffix for file in files}
    if kinds == {".json"}:
        pairs = _read_json_lists(files, split, image_root)
        return _as_stream(pairs) if streaming else pairs
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "dataset_dict.json")):
        pairs = datasets.load_from_disk(source)[split]
        return _as_stream(pairs) if streaming else pairs
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "state.json")):
        pairs = datasets.load_from_disk(source)
        return _as_stream(pairs) if streaming else pairs
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
    return _read(_json_records, files, False, split=split, image_root=image_root)


def _json_records(
    files: Sequence[str], split: str, image_root: str | None, stamps: Sequence[tuple[int, int]] = ()
) -> Iterator[dict]:
    for file in files:
        root = image_root if image_root is not None else os.path.dirname(file)
        for number, row in enumerate(_json_rows(file, split)):
            path = row.get("image")
            caption = row.get("caption")
            captions = caption if isinstance(caption, list) else [caption]
            yield {
                "image": {"bytes": None, "path": os.path.join(root, path)} if path else None,
                "captions": [text[:MAX_CHARACTERS] for text in captions if isinstance(text, str)],
                "image_id": str(row.get("image_id", path or f"{file}:{number}")),
            }


def _json_rows(file: str, split: str) -> Iterator[dict]:
    """The objects of a JSON list, one by one, or the images of one of Karpathy's splits.

    What is not UTF-8 becomes U+FFFD, so that one bad caption does not take the others with it.
    """
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        text, place, number = "", 0, 0

        def next_character() -> str:
            """The first one that is not white space; empty at the end of the file."""
            nonlocal text, place
            while True:
                place = _WHITE_SPACE.match(text, place).end()
                if place < len(text):
                    return text[place]
                text, place = stream.read(_JSON_CHUNK), 0
                if not text:
                    return ""

        if next_character() != "[":
            try:
                content = json.loads(text + stream.read())
            except json.JSONDecodeError as error:
                raise DataError(f"{file} is not a JSON list: {error}.") from error
            if not isinstance(content, dict) or not isinstance(content.get("images"), list):
                raise DataError(f"{file} is not a list of objects with 'image' and 'caption'.")
            yield from _karpathy_rows(content["images"], split, file)
            return
        place += 1
        while (character := next_character()) != "]":
            if number:
                if character != ",":
                    raise DataError(f"{file} is not a JSON list: after row {number} a comma or the end is missing.")
                place += 1
                character = next_character()
            if character and character != "{":
                raise DataError(f"{file} is not a list of objects with 'image' and 'caption': see row {number + 1}.")
            while True:
                try:
                    row, place = decoder.raw_decode(text, place)
                    break
                except json.JSONDecodeError as error:  # perhaps only because the text read so far ends here
                    more = stream.read(max(_JSON_CHUNK, len(text) - place))
                    text, place = text[place:] + more, 0
                    if not more or len(text) > _JSON_LONGEST_ROW:
                        raise DataError(f"{file} is not a JSON list: row {number + 1}: {error}.") from error
            number += 1
            yield row


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


def _read_tars(
    source: str, files: list[str], streaming: bool, image_column: str | None, caption_column: str | None
) -> Dataset | IterableDataset:
    """Read WebDataset tars; each sample is judged by itself, however its text is encoded and whatever it lacks."""
    fields = {field for sample in islice(_tar_samples(files[0], None), 100) for field in sample} - {"__key__"}
    _find_column(sorted(fields), image_column, IMAGE_COLUMNS, "image", source)
    _find_column(sorted(fields), caption_column, CAPTION_COLUMNS, "caption", source)
    images = (image_column,) if image_column is not None else IMAGE_COLUMNS
    captions = (caption_column,) if caption_column is not None else CAPTION_COLUMNS
    return _read(_tar_records, files, streaming, images=images, captions=captions)


def _tar_records(
    files: Sequence[str], images: tuple[str, ...], captions: tuple[str, ...], stamps: Sequence[tuple[int, int]] = ()
) -> Iterator[dict]:
    for file in files:
        for sample in _tar_samples(file, {*images, *captions}):
            image = next((name for name in images if name in sample), None)
            caption = next((name for name in captions if name in sample), None)
            # What is not UTF-8 becomes U+FFFD: the sample is skipped and listed when its turn comes.
            text: Any = sample[caption].decode("utf-8", errors="replace") if caption else None
            if caption and caption.endswith("json"):
                try:
                    text = json.loads(text)
                except json.JSONDecodeError:
                    text = None
            key = sample["__key__"]
            yield {
                "image": {"bytes": sample[image], "path": f"{key}.{image}"} if image else None,
                "captions": _texts(text),
                "image_id": key,
            }


def _tar_samples(file: str, wanted: set[str] | None) -> Iterator[dict[str, Any]]:
    """The samples of a tar: files whose names differ only after the first dot, by what follows it.

    Others than the `wanted` are not read; all are if it is None.
    """
    sample: dict[str, Any] = {}
    for name, member in datasets.StreamingDownloadManager().iter_archive(file):
        folder, _, base = name.rpartition("/")
        stem, dot, field = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not dot:
            continue
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        sample["__key__"] = key
        if wanted is None or field.lower() in wanted:
            sample[field.lower()] = member.read()
    if sample:
        yield sample


def _texts(caption: Any) -> list[str]:
    """A caption, several, or objects with a caption, as a list of texts."""
    captions = list(caption) if isinstance(caption, list | tuple) else [caption]
    # img2dataset's .json, or a list of {"raw": text} as in Karpathy's splits
    texts = [text.get("caption", text.get("raw")) if isinstance(text, dict) else text for text in captions]
    return [text[:MAX_CHARACTERS] for text in texts if isinstance(text, str)]


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
        complete = partial(complete, mark="#")
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


def _complete(record: dict, index: int, image: str, caption: str, image_id: str | None, mark: str = "") -> dict:
    """A record of named columns: its captions as a list, and its id, or else its number, as text.

    The number of a stream is only that in a shard; it is marked, for the loader of streams to add the shard's.
    """
    number = record.get(image_id) if image_id else None
    complete = {
        "captions": _texts(record[caption]),
        "image_id": f"{mark}{index}" if number is None else str(number),
    }
    return complete | {"image": record[image]} if image in record else complete


def captions_of(pairs: Any) -> Iterator[str]:
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
    texts = [clean_caption(caption[:MAX_CHARACTERS]) for caption in captions]
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

    A run that goes on makes the visits after its checkpoint again, also those of batches that were prepared ahead: it
    lists no bad sample that is listed already, and counts none twice. (Good ones that were prepared ahead count twice
    among those seen.) The sample that each of a loader's workers began last is known, for the case that it dies.

    Args:
        path: the list's file; None keeps none.
        max_share: the run stops when a larger share of the samples seen is bad.
    """

    path: str | os.PathLike | None = None
    max_share: float = 0.1
    min_seen: int = 100
    last: str = field(default="none yet", init=False)
    # Visits listed by the run before this one, and whether its checkpoint has counted them.
    _listed: dict[str, bool] = field(default_factory=dict, init=False, repr=False)
    _seen: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _skipped: Any = field(default_factory=lambda: Value("q", 0), repr=False)
    _begun: Any = field(default_factory=lambda: Array("c", _WORKERS * _ID_BYTES, lock=False), repr=False)

    @property
    def count(self) -> int:
        return self._skipped.value

    def state_dict(self) -> dict[str, int]:
        """The numbers of this process so far, and how long the list is, for a checkpoint."""
        with self._skipped.get_lock():  # nothing is counted and not yet listed
            size = os.path.getsize(self.path) if self.path is not None and os.path.exists(self.path) else 0
            return {"seen": self._seen.value, "count": self.count, "list_bytes": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint: with its numbers, and knowing what is listed."""
        self._seen.value, self._skipped.value = state.get("seen", 0), state.get("count", 0)
        if self.path is None or not os.path.exists(self.path):
            return
        position = 0
        with open(self.path, "rb") as file:
            for text in file:
                position += len(text)
                try:
                    line = json.loads(text)
                except ValueError:  # cut off in the midst, by a full disk for instance: it tells of no visit
                    continue
                if "visit" in line:
                    name = _visit_name(line["image_id"], *line["visit"])
                    self._listed[name] = position <= state.get("list_bytes", 0)

    def mend_list(self) -> None:
        """Take off the last line if a kill has cut it; for one process, while no other adds to the list."""
        if self.path is not None and os.path.exists(self.path):
            content = Path(self.path).read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def saw(self, number: int) -> None:
        with self._seen.get_lock():
            self._seen.value += number

    def add(self, image_id: object, reason: str, visit: "Visit | None" = None) -> None:
        """Note one bad sample, why it is bad, and the visit on which it was found."""
        self.last = f"{image_id}: {reason}"
        entry: dict[str, Any] = {"image_id": str(image_id), "reason": reason}
        is_listed = is_counted = False
        if visit is not None:
            entry["visit"] = [visit.epoch, visit.index]
            name = _visit_name(entry["image_id"], *entry["visit"])
            is_listed, is_counted = name in self._listed, self._listed.get(name, False)
        with self._skipped.get_lock():
            self._skipped.value += not is_counted
            if self.path is not None and not is_listed:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def begins(self, image_id: object) -> None:
        """Note the sample that this process works on, if it is a worker of a loader."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            text = f"{os.getpid()} {image_id}".encode(errors="replace")[:_ID_BYTES].ljust(_ID_BYTES, b"\0")
            place = worker.id % _WORKERS * _ID_BYTES
            memoryview(self._begun).cast("B")[place : place + _ID_BYTES] = text

    def begun_by(self, pid: int) -> str | None:
        """The sample that a worker began last; None if it has not begun any."""
        notes = bytes(memoryview(self._begun).cast("B"))
        for place in range(0, len(notes), _ID_BYTES):
            number, _, image_id = notes[place : place + _ID_BYTES].rstrip(b"\0").partition(b" ")
            if number == str(pid).encode():
                return image_id.decode(errors="replace")
        return None

    @contextmanager
    def naming_dead_workers(self) -> Iterator[None]:
        """Say of a loader's worker that dies which sample it died on.

        PyTorch tells of it at any point of the main process, so this goes around the whole loop.

        Raises:
            DataError: in place of PyTorch's `RuntimeError`.
        """
        try:
            yield
        except RuntimeError as error:
            dead = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
            if dead is None:
                raise
            samples = {pid: self.begun_by(int(pid)) for pid in dead[1].split(", ")}
            where = "; ".join(
                f"worker {pid} " + ("had not begun any" if sample is None else f"last began '{sample}'")
                for pid, sample in samples.items()
            )
            raise DataError(
                f"A worker of the loader died ({str(error).strip().splitlines()[0]}). Sample: {where}. If memory ran "
                "out, lower num_workers; if that sample crashes its decoder, take it out of the data."
            ) from error

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


def _visit_name(image_id: str, epoch: int, index: int) -> str:
    """What a visit of a sample is known by; several samples may share one, as texts about one image do."""
    return f"{epoch} {index} {image_id}"


def mix_seeds(*numbers: int) -> int:
    """A seed of 64 bits that follows from numbers and their order."""
    mixed = 0
    for number in numbers:  # splitmix64's finaliser on each
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


@dataclass(frozen=True)
class Visit:
    """One visit of a sample: all its random choices follow from these numbers, whichever process makes them."""

    seed: int
    epoch: int
    index: int

    def entropy(self) -> int:
        """A seed for the choices of this visit."""
        return mix_seeds(self.seed, self.epoch, self.index)

    def caption(self, number: int) -> int:
        """Which of a record's captions a collator takes: its first choice, foreseen."""
        if number < 2:
            return 0
        return int(torch.randint(number, (), generator=torch.Generator().manual_seed(self.entropy())))


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
        yield from self._visits(self._order()[self.start :])

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(Visit(self.seed, self.epoch, -1).entropy() >> 1)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def _visits(self, order: list[int]) -> Iterator[Visit]:
        for index in order:
            yield Visit(self.seed, self.epoch, index)


class CaptionLengths:
    """Words and characters of every caption of map-style records, read once and without the images.

    Words follow tokens closely and are counted twenty times faster.

    Raises:
        DataError: for records without captions.
    """

    def __init__(self, pairs: Dataset):
        if "captions" not in getattr(pairs, "column_names", ()):
            raise DataError(
                "bucket_by_length puts captions of about the same length together, and these records have none: "
                "leave it out."
            )
        numbers, words, characters = [], [], []
        for table in pairs.select_columns(["captions"]).with_format("arrow").iter(100_000):
            column = pc.cast(table["captions"].combine_chunks(), pa.list_(pa.string()))
            texts = column.flatten()
            numbers.append(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
            words.append(pc.fill_null(pc.count_substring_regex(texts, _WORD), 0).to_numpy())
            characters.append(pc.fill_null(pc.utf8_length(texts), 0).to_numpy())
        self.first = np.concatenate([[0], *numbers]).cumsum()  # of each sample among all captions
        self.words, self.characters = np.concatenate(words), np.concatenate(characters)

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, visit: Visit) -> tuple[int, int]:
        """Words of the caption that is taken, and among equal ones (all, where words are not spaced) characters.

        Where some of a sample's captions can not be used it may be another's: the order is a guess, not a promise.
        """
        first, end = self.first[visit.index : visit.index + 2].tolist()
        if first == end:
            return 0, 0
        caption = first + visit.caption(end - first)
        return int(self.words[caption]), int(self.characters[caption])


class BucketSampler(VisitSampler):
    """The visits of one epoch in groups of about equally long captions, so that little padding is computed.

    Within windows of the shuffled order visits are sorted by the length of the caption that they take; the groups of a
    window come in random order. What does not fill a group stays at the end, so that a loader which drops it leaves out
    what it would without groups.

    Args:
        lengths: of the captions of each sample.
        group_size: visits of a group: one batch of each process.
        window: groups in a window. More leave less padding (of Flickr8k's captions by 32: 10 leave 8 %, 50 leave 2 %)
            and mix the samples less.
    """

    def __init__(self, lengths: CaptionLengths, seed: int, group_size: int, window: int = 50):
        super().__init__(len(lengths), seed)
        self.lengths, self.group_size, self.window = lengths, group_size, window

    def __iter__(self) -> Iterator[Visit]:
        size = self.group_size
        num_grouped = self.num_samples // size * size
        order = self._order()
        for begin in range(0, num_grouped, self.window * size):
            end = min(begin + self.window * size, num_grouped)
            if end <= self.start:  # done before the run went on
                continue
            window = sorted(self._visits(order[begin:end]), key=self.lengths.of)
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, -1, begin))
            groups = torch.randperm(len(window) // size, generator=generator).tolist()
            visits = (visit for group in groups for visit in window[group * size : (group + 1) * size])
            yield from islice(visits, max(self.start - begin, 0), None)
        yield from self._visits(order[max(self.start, num_grouped) :])


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
