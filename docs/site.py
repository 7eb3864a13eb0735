"""Additions of the site to the pages: formulas, the cards of `model_cards/`, and the reference.

MkDocs calls these functions while it builds. On the site of a code host, the same pages are read as they are.
"""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
_CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", flags=re.DOTALL)
_BLOCK = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)
_INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\w)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the model cards with their pictures, which stand beside `docs/`."""
    for path in sorted(CARDS.rglob("*")):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead to the cards where the site has them, and turn formulas into MathML, which browsers draw."""
    markdown = markdown.replace("](../model_cards/", "](model_cards/")
    parts = _CODE.split(markdown)  # Odd ones are code.
    parts[::2] = [_with_formulas(part) for part in parts[::2]]
    return "".join(parts)


def _with_formulas(text: str) -> str:
    text = _BLOCK.sub(lambda found: f"\n\n{convert(found[1].strip(), display='block')}\n\n", text)
    return _INLINE.sub(lambda found: convert(found[1]), text)
