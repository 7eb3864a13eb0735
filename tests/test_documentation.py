"""The site has every page and every public name."""

import ast
import re

import pytest
import yaml
from helpers import ROOT

import tcl_hf

DOCS = ROOT / "docs"
# Commands are described by their help, and annotations of data sets by the pages of the tasks.
MODULES = [
    path for path in sorted((ROOT / "tcl_hf").rglob("*.py")) if "cli" not in path.parts and path.stem != "__main__"
]


def public_names(path) -> list[str]:
    """The public classes and functions that a module defines."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(path.read_text()).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def described() -> set[str]:
    """The modules whose public names the reference lists."""
    pages = (DOCS / "reference").glob("*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)}


def test_the_reference_lists_every_module_with_public_names_and_no_other():
    assert described() == {module_name(path) for path in MODULES if public_names(path)}


@pytest.mark.parametrize("name", tcl_hf.__all__)
def test_the_reference_lists_every_name_of_the_package(name):
    assert getattr(tcl_hf, name).__module__ in described()


def pages_of(nav) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(pages_of, parts))


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")}
    assert pages_of(config["nav"]) == found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
