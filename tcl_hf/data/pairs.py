"""Where image-text pairs come from: one entry, `load_pairs`, and one record for every source.

A record has `image` (undecoded: bytes, a path, or both), `captions` (a list) and `image_id`. Sources go through
`datasets`, map-style or streaming.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from .embedded.openmoji import load_openmoji

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
