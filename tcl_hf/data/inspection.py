"""Facts about a source of images and captions, before anything is trained on it."""

import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..models.processing_tcl import TCLProcessor
from .captions import MAX_CHARACTERS, usable_captions
from .images import IMAGE_ERRORS, identity_of, open_image

SPLITS = ("train", "validation", "test")
_MAX_NAMED = 5  # samples in a list
_COMMON = 0.01  # share of the letters from which on a script is named
_UNKNOWN = 0.01  # share of unknown tokens from which on a vocabulary does not fit


@dataclass
class Inspection:
    """Facts about the samples of a split that were looked at.

    Args:
        num_samples: samples of the split.
        looked_at: rows of the samples that were looked at, spread evenly.
        unusable: the reason why a sample would be skipped, by its row and id.
        sizes: width and height of each image that could be read.
        modes, formats: how many images have which mode and format.
        num_tokens: length of each caption in tokens, [CLS] included, before it is cut.
        unknown: unknown tokens among all tokens of all captions, as a share.
        scripts: share of the letters that belong to each script, by its name in Unicode.
        captions: number of captions of each sample.
        same_images: rows whose image is the same, byte for byte.
        same_captions: the most frequent caption, and how often it occurs.
    """

    num_samples: int
    looked_at: Sequence[int]
    unusable: dict[tuple[int, str], str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    num_tokens: list[int] = field(default_factory=list)
    unknown: float = 0.0
    scripts: dict[str, float] = field(default_factory=dict)
    captions: list[int] = field(default_factory=list)
    same_images: list[list[int]] = field(default_factory=list)
    same_captions: tuple[str, int] = ("", 0)

    def to_dict(self, max_tokens: int) -> dict[str, Any]:
        """The facts as JSON holds them; `max_tokens` is the length at which captions are cut."""
        widths, heights = zip(*self.sizes, strict=True) if self.sizes else ((), ())
        return {
            "samples": self.num_samples,
            "looked_at": len(self.looked_at),
            "captions": sum(self.captions),
            "captions_per_image": _spread(self.captions),
            "width": _spread(widths),
            "height": _spread(heights),
            "modes": dict(self.modes.most_common()),
            "formats": dict(self.formats.most_common()),
            "tokens": _spread(self.num_tokens),
            "captions_cut": sum(number > max_tokens for number in self.num_tokens),
            "unknown_tokens": round(self.unknown, 4),
            "scripts": {name: round(share, 3) for name, share in self.scripts.items()},
            "same_images": sum(len(rows) - 1 for rows in self.same_images),
            "most_frequent_caption": {"text": self.same_captions[0], "times": self.same_captions[1]},
            "skipped": dict(Counter(self.unusable.values()).most_common()),
        }

    def describe(self, max_tokens: int) -> list[str]:
        """The facts as lines of text; `max_tokens` is the length at which captions are cut."""
        facts = self.to_dict(max_tokens)
        cut, number = facts["captions_cut"], len(self.num_tokens)
        widths, heights = [width for width, _ in self.sizes], [height for _, height in self.sizes]
        lines = [
            f"samples: {self.num_samples:,}, of which {len(self.looked_at):,} were looked at",
            f"captions: {sum(self.captions):,}, {_in_words(self.captions)} per image",
            f"images: {_in_words(widths)} pixels wide, {_in_words(heights)} high",
            f"modes: {_counted(self.modes)}; formats: {_counted(self.formats)}",
            f"tokens: {_in_words(self.num_tokens)}; {cut:,} of {number:,} captions are longer than max_tokens="
            f"{max_tokens} and are cut",
            "scripts: " + (", ".join(f"{name.lower()} {share:.0%}" for name, share in self.scripts.items()) or "none"),
        ]
        if self.unknown > _UNKNOWN:
            lines.append(
                f"unknown tokens: {self.unknown:.1%}. The tokenizer lacks the words or the script of these captions: "
                "name another one with --tokenizer, or start from another text model."
            )
        if self.same_images:
            first = ", ".join(str(row) for row in self.same_images[0][:_MAX_NAMED])
            lines.append(
                f"duplicates: {facts['same_images']:,} samples repeat the image of another one (rows {first}, ...)"
            )
        if self.same_captions[1] > 1:
            lines.append(f"most frequent caption: {self.same_captions[0][:80]!r}, {self.same_captions[1]:,} times")
        lines.append(f"would be skipped: {len(self.unusable):,} of {len(self.looked_at):,}")
        for reason, times in Counter(self.unusable.values()).most_common(_MAX_NAMED):
            names = [f"row {row} ({image_id})" for (row, image_id), why in self.unusable.items() if why == reason]
            lines.append(f"  {times:,} times {reason}: {', '.join(names[:_MAX_NAMED])}")
        return lines


def inspect(records: Any, processor: TCLProcessor, max_samples: int = 2000, progress: bool = True) -> Inspection:
    """Look at samples of a map-style data set: open every image, and read every caption, as training would.

    Args:
        records: records of image-text pairs.
        processor: cleans the captions, and makes tokens of them.
        max_samples: the samples to look at, spread evenly; 0 for all.
    """
    step = max(1, -(-len(records) // max_samples)) if max_samples else 1
    found = Inspection(len(records), range(0, len(records), step))
    texts: Counter[str] = Counter()
    images: dict[str, list[int]] = {}
    for row in tqdm(found.looked_at, "Looking at samples", disable=not progress, leave=False):
        record = records[row]
        try:
            captions = usable_captions(record, str)  # as they are written
            usable_captions(record, processor.clean_caption)
            with open_image(record["image"]) as image:
                kind, mode = getattr(image, "format", None) or "?", image.mode
                image.convert("RGB")
                found.sizes.append(image.size)
        except IMAGE_ERRORS as error:
            reason = " ".join(str(error).split())
            found.unusable[row, str(record.get("image_id"))] = _without_names(reason)
            continue
        found.formats[kind] += 1
        found.modes[mode] += 1
        found.captions.append(len(captions))
        texts.update(captions)
        images.setdefault(identity_of(record["image"]), []).append(row)
    found.same_images = [rows for rows in images.values() if len(rows) > 1]
    found.same_captions = texts.most_common(1)[0] if texts else ("", 0)
    found.scripts = _scripts(texts)
    _count_tokens(found, texts, processor)
    return found


def _count_tokens(found: Inspection, texts: Counter, processor: TCLProcessor) -> None:
    """Note the lengths of all captions in tokens, and the share of unknown ones."""
    unknown = total = 0
    for text, times in texts.items():
        tokens = processor.tokenizer.encode(processor.clean_caption(text, MAX_CHARACTERS))
        found.num_tokens += [len(tokens)] * times
        total += times * len(tokens)
        unknown += times * tokens.count(processor.tokenizer.unk_token_id)
    found.unknown = unknown / total if total else 0.0


def _scripts(texts: Counter) -> dict[str, float]:
    """The share of the letters of each script, for those that are not rare."""
    letters: Counter[str] = Counter()
    for text, times in texts.items():
        for letter in filter(str.isalpha, text):
            letters[unicodedata.name(letter, "UNKNOWN").split()[0]] += times
    total = letters.total()
    return {name: number / total for name, number in letters.most_common() if number / total >= _COMMON}


def _without_names(reason: str) -> str:
    """A reason without the path or the address of one image, so that equal reasons are counted together."""
    for mark in (": '", " file <", " file '"):
        reason = reason.split(mark)[0]
    return reason


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    """The smallest, the middle and the largest number; empty for none."""
    if not numbers:
        return {}
    return {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}


def _in_words(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none"
    if min(numbers) == max(numbers):
        return f"{numbers[0]}"
    return f"{min(numbers)} to {max(numbers)} (median {statistics.median(numbers):g})"


def _counted(kinds: Counter) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in kinds.most_common()) or "none"
