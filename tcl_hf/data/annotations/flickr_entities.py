"""The files of Flickr30k Entities: rows with the captions of an image, the phrases in them, and their boxes.

A "chain" is an entity of an image: all phrases that mention it and all boxes that show it have the id of the chain.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ..pairs import DataError
from .rows import Row
from .sources import Source

_PHRASE = re.compile(r"\[/EN#(\d+)((?:/\w+)+) ([^\]]+)\]")  # chain, types, words: [/EN#12/people Two boys]


def read_flickr_entities(source: Source) -> Iterator[Row]:
    """Yield a row for each image in the split of a Flickr30k Entities folder.

    Raises:
        DataError: if a file of the folder is missing or broken.
    """
    folder = Path(source.name)
    lists = [folder / f"{name}.txt" for name in source.split_names]
    chosen = next((file for file in lists if file.exists()), None)
    if chosen is None:
        raise DataError(
            f"{folder} has no {lists[0].name}: a split of Flickr30k Entities is a list of image ids in that file."
        )
    for number, image_id in enumerate(chosen.read_text(encoding="utf-8").split(), 1):
        width, height, boxes = _read_boxes(folder / "Annotations" / f"{image_id}.xml")
        file = folder / "Sentences" / f"{image_id}.txt"
        if not file.exists():
            raise DataError(f"{file} is missing: {chosen.name} names it; extract all of Flickr30k Entities.")
        captions, phrases = _read_sentences(file)
        for phrase in phrases:
            phrase["boxes"] = boxes.get(phrase["phrase_id"])
        fields = {"image_id": image_id, "captions": captions, "phrases": phrases, "width": width, "height": height}
        yield Row(str(chosen), number, fields)


def _read_sentences(file: Path) -> tuple[list[str], list[dict]]:
    """The captions of an image, and the phrases in them."""
    captions: list[str] = []
    phrases: list[dict] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        caption, found = _parse_sentence(line.strip())
        if "[/EN" in caption:
            raise DataError(
                f"{file}, row {number}: a phrase does not have the form '[/EN#12/people Two boys]': {caption!r}; "
                "extract the file again."
            )
        phrases += [phrase | {"caption_index": len(captions)} for phrase in found]
        captions.append(caption)
    return captions, phrases


def _parse_sentence(line: str) -> tuple[str, list[dict]]:
    """The caption of a line without its marks, and the phrases that were marked."""
    caption, phrases, done = "", [], 0
    for match in _PHRASE.finditer(line):
        chain, types, words = match.groups()
        caption += line[done : match.start()]
        span = {"start": len(caption), "end": len(caption) + len(words), "phrase": words}
        phrases.append(span | {"types": types[1:].split("/"), "phrase_id": chain})
        caption += words
        done = match.end()
    return caption + line[done:], phrases


def _read_boxes(file: Path) -> tuple[int, int, dict[str, list]]:
    """Width and height of an image, and the boxes of its chains by their ids."""
    boxes: dict[str, list] = {}
    try:
        root = ElementTree.parse(file).getroot()
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for item in root.iter("object"):
            corners = item.find("bndbox")
            if corners is None:  # the whole scene, or not visible
                continue
            x1, y1, x2, y2 = (float(corners.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in item.iter("name"):  # one object may belong to several chains
                # Pixels are counted from 1 and the last one is included; records have the outer edges.
                boxes.setdefault(name.text or "", []).append([x1 - 1, y1 - 1, x2, y2])
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} could not be read: {error}; extract all of Flickr30k Entities.") from error
    return width, height, boxes
