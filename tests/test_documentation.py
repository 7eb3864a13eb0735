"""The site has every page and every public name."""

import ast
import importlib.util
import re
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT

import tcl_hf

pytest.importorskip("mkdocs", reason="MkDocs is not installed")
DOCS = ROOT / "docs"
SPEC = importlib.util.spec_from_file_location("documentation_site", DOCS / "site.py")
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)
# Commands are described by their help.
MODULES = [path for path in sorted((ROOT / "tcl_hf").rglob("*.py")) if "cli" not in path.parts]


def test_the_reference_has_a_page_for_every_package_but_that_of_the_commands():
    packages = {path.name for path in (ROOT / "tcl_hf").iterdir() if (path / "__init__.py").is_file()}
    assert packages == {*site.PACKAGES, "cli"}


@pytest.mark.parametrize("name", tcl_hf.__all__)
def test_the_reference_lists_every_name_of_the_package(name):
    module = getattr(tcl_hf, name).__module__
    assert f"::: {module}\n" in site.reference()["reference/models.md"]
    assert name in site.public_names(ROOT / f"{module.replace('.', '/')}.py")


def pages_of(nav) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(pages_of, parts))


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")}
    assert pages_of(config["nav"]) == found | site.reference().keys()


@pytest.mark.parametrize(
    ("name", "becomes"), [("notebooks/train.ipynb", "../data.html#rows"), ("page.md", "../data.md#rows")]
)
def test_links_of_notebooks_lead_to_pages(name, becomes):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    foreign = '<a href="https://example.org/data.md">'
    html = site.on_page_content(f'<a href="../data.md#rows">{foreign}', page=page)
    assert html == f'<a href="{becomes}">{foreign}'


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def public_functions():
    """The public functions and methods: their place, their node, and whether a base may describe them."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
            for function in inside:
                if isinstance(function, kinds) and not function.name.startswith("_"):
                    inherits = function is not node and bool(node.bases)
                    yield f"{path.relative_to(ROOT)}:{function.lineno} {function.name}", function, inherits


def arguments_of(function) -> set[str]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    starred = [one for one in (given.vararg, given.kwarg) if one is not None]
    return {one.arg for one in named + starred if one.arg not in ("self", "cls")}


# Argument names of a docstring: a line may describe several, "image_mean, image_std: ...".
_ARGS = re.compile(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", flags=re.M)
_NAMES = re.compile(r"^ {4}(\w[\w, *]*):", flags=re.M)


@pytest.mark.parametrize("rule", ["described", "arguments", "errors", "names"])
def test_public_functions_describe_their_arguments_and_errors(rule):
    """From four arguments on each is described; errors that a function raises itself are named."""
    wrong = []
    for place, function, inherits in public_functions():
        text = ast.get_docstring(function) or ""
        raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))
        refers = re.search(r"[Aa]rguments (are|as)\b|for the arguments|the arguments\b", text)
        section = _ARGS.search(text + "\n")
        names = (
            {name.strip(" *") for line in _NAMES.findall(section[1]) for name in line.split(",")} if section else set()
        )
        wrong += {
            "described": [place] * (not text and not inherits),
            "arguments": [place] * (len(arguments_of(function)) >= 4 and bool(text) and not section and not refers),
            "errors": [place] * (raises and bool(text) and "Raises:" not in text),
            "names": [f"{place}: {names - arguments_of(function)}"] * bool(names - arguments_of(function)),
        }[rule]
    assert not wrong
