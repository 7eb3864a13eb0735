"""The figures of the documentation: each is what its script draws, and says in words what it shows."""

import re
import runpy

import matplotlib
import pytest
from helpers import ROOT

FIGURES = ROOT / "docs" / "figures"
IMAGES = ROOT / "docs" / "images"
SCRIPTS = sorted(path for path in FIGURES.glob("*.py") if path.stem != "figure_style")


@pytest.fixture
def drawn_in(tmp_path, monkeypatch):
    """The folder into which the scripts draw."""
    monkeypatch.syspath_prepend(FIGURES)
    import figure_style

    monkeypatch.setattr(figure_style, "IMAGES", tmp_path)
    return tmp_path


def texts_of(svg: str) -> list[str]:
    """The texts of a figure, which matplotlib writes as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_figures_are_those_that_the_script_draws(script, drawn_in):
    """Other versions of matplotlib write other outlines, and so only their texts are compared."""
    runpy.run_path(str(script), run_name="__main__")
    drawn = sorted(drawn_in.glob("*.svg"))
    assert drawn
    for figure in drawn:
        new, kept = figure.read_text(), (IMAGES / figure.name).read_text()
        assert texts_of(new) == texts_of(kept), f"{figure.name} is out of date: run {script.relative_to(ROOT)}"
        if f"Matplotlib v{matplotlib.__version__}," in kept:
            assert new == kept, f"{figure.name} is out of date: run {script.relative_to(ROOT)}"


def test_every_figure_is_drawn_by_a_script_and_stands_on_a_page():
    drawn = {name for script in SCRIPTS for name in re.findall(r'save\("(\w+)"\)', script.read_text())}
    assert drawn == {path.stem for path in IMAGES.glob("*.svg")}
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert drawn == set(re.findall(r"\(images/(\w+)\.svg\)", pages))


def test_every_picture_of_a_page_has_a_text_that_says_what_it_shows():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for text, target in re.findall(r"!\[(.*?)\]\(([^)]+)\)", page.read_text(), flags=re.DOTALL):
            assert len(text.split()) >= 4, (page.name, target)
