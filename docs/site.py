"""Additions of the site to the pages: formulas, the cards of `model_cards/`, and the reference.

MkDocs calls these functions while it builds. On the site of a code host, the same pages are read as they are.
"""

import ast
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
PACKAGES = {  # in the order of imports: a package imports from those above it
    "models": "configurations, models, heads, losses, teacher, queues and the processor: all names of `tcl_hf` itself, "
    "which `from tcl_hf import ...` imports",
    "data": "sources to records, streams, samples that are skipped, views, batches and kept states",
    "inference": "pipelines, heat maps and export",
    "evaluation": "one module for each evaluator, the metrics and the baselines",
    "training": "the loop, its engine, checkpoints, adapters, planning and the log",
    "sharing": "the Hub, model cards, and conversion of the original's checkpoints",
    "recipes": "the arguments of the commands, what they build, and reports",
    "search": "an index of pictures with re-ranking, and filters of pairs",
    "app": "the HTTP service and the app",
}
_CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", flags=re.DOTALL)
_BLOCK = re.compile(r"\$\$(.+?)\$\$", flags=re.DOTALL)
_PAGE_LINK = re.compile(r'href="(?![a-z]+:)([^"#]+)\.(?:md|ipynb)(?=["#])')
_INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\w)")


def public_names(module: Path) -> list[str]:
    """The public classes and functions that a module defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    body = ast.parse(module.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def modules_of(package: str) -> list[str]:
    """The names of the modules of a package that have public names."""
    files = sorted((ROOT / "tcl_hf" / package).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if public_names(file)]


def reference() -> dict[str, str]:
    """The pages of the reference, by their place in the site."""
    rows = [f"| [{package}]({package}.md) | {contents} |" for package, contents in PACKAGES.items()]
    pages = {
        "reference/index.md": "# Reference\n\nEvery public class and function, from its docstring: shapes, units, "
        "errors and sources. The pages follow the packages of `tcl_hf`. A package imports only from those above "
        "it.\n\n"
        "| package | contents |\n|---|---|\n" + "\n".join(rows) + "\n"
    }
    for package, contents in PACKAGES.items():
        modules = "\n\n".join(f"::: {name}" for name in modules_of(package))
        pages[f"reference/{package}.md"] = f"# {package.capitalize()}\n\nHere are {contents}.\n\n{modules}\n"
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and the model cards with their pictures, which stand beside `docs/`."""
    for name, content in reference().items():
        files.append(File.generated(config, name, content=content))
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


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Let the links of notebooks lead to pages; MkDocs sees to those of Markdown alone."""
    return _PAGE_LINK.sub(r'href="\1.html', html) if page.file.src_uri.endswith(".ipynb") else html


def _with_formulas(text: str) -> str:
    text = _BLOCK.sub(lambda found: f"\n\n{convert(found[1].strip(), display='block')}\n\n", text)
    return _INLINE.sub(lambda found: convert(found[1]), text)
