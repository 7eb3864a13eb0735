"""The hits of a search as a table, a page or a sheet of pictures."""

import base64
import html
import os
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..recipes.report import sample_sheet
from .index import Hit
from .storage import SearchError

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em; background: #fff; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 1.2em }}
figure {{ margin: 0 }} img {{ width: 100%; height: 170px; object-fit: contain; background: #f4f4f4 }}
figcaption {{ overflow-wrap: anywhere; font-size: 12px }}
</style>
<h1>{title}</h1><main>
{figures}
</main></html>
"""


def hit_facts(hit: Hit) -> dict[str, Any]:
    """A hit as JSON holds it, without its thumbnail."""
    return {one.name: getattr(hit, one.name) for one in fields(hit) if one.repr}


def table(hits: Sequence[Hit]) -> str:
    """A line for each hit: its place, its scores, and its path or name."""
    lines = [f"{'':>4}  {'score':>8}  {'similarity':>10}  {'matching':>8}  picture"]
    for number, hit in enumerate(hits, 1):
        matching = "-" if hit.matching is None else f"{hit.matching:.3f}"
        caption = f"  ({hit.caption.splitlines()[0]})" if hit.caption else ""
        missing = "  [the file is there no longer]" if hit.is_missing else ""
        name = f"{hit.path or hit.name or hit.image_id}{caption}{missing}"
        lines.append(f"{number:>4}  {hit.score:>8.3f}  {hit.similarity:>10.3f}  {matching:>8}  {name}")
    return "\n".join(lines)


def write_page(hits: Sequence[Hit], title: str, path: str | os.PathLike) -> None:
    """Write hits as a page that needs no other file (`.html`), or as a sheet of pictures (`.png`, `.jpg`, `.pdf`).

    Raises:
        SearchError: for another ending, or a place that cannot be written.
    """
    file = Path(path)
    try:
        if file.suffix.lower() in (".html", ".htm"):
            figures = "\n".join(_figure(number, hit) for number, hit in enumerate(hits, 1))
            file.write_text(_PAGE.format(title=html.escape(title), figures=figures), encoding="utf-8")
        elif file.suffix.lower() in (".png", ".jpg", ".jpeg", ".pdf"):
            records = [
                {
                    "image": {"bytes": hit.thumbnail},
                    "captions": [f"{number}. {hit.score:.3f} {hit.caption or hit.name}"],
                }
                for number, hit in enumerate(hits, 1)
            ]
            sample_sheet(records, file)
        else:
            raise SearchError(f"{path} is neither a page nor a picture: let its name end in .html or .png.")
    except OSError as error:
        raise SearchError(f"{path} cannot be written ({error.strerror or error}): name another file.") from error


def show_page(path: str | os.PathLike) -> None:
    """Open a page in a browser, if there is a screen."""
    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(Path(path).resolve().as_uri())


def _figure(number: int, hit: Hit) -> str:
    """The figure of a hit, with its thumbnail and a link to its file."""
    image = f'<img src="data:image/jpeg;base64,{base64.b64encode(hit.thumbnail).decode()}" alt="">'
    if hit.path is not None:
        image = f'<a href="{html.escape(Path(hit.path).as_uri(), quote=True)}">{image}</a>'
    scores = f"{number}. score {hit.score:.3f}, similarity {hit.similarity:.3f}"
    if hit.matching is not None:
        scores += f", matching {hit.matching:.3f}"
    name = html.escape(hit.path or hit.name or hit.image_id)
    caption = f"<br>{html.escape(hit.caption)}" if hit.caption else ""
    return f"<figure>{image}<figcaption>{scores}<br>{name}{caption}</figcaption></figure>"
