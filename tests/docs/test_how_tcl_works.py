"""The page on the method: the code that it quotes stands in the package, and its figures in their sources."""

import re
import runpy
import textwrap

import pytest
from helpers import ROOT

PAGE = ROOT / "docs" / "how_tcl_works.md"


def quoted() -> list[tuple[str, str]]:
    """The code that the page quotes, with the file that it names before it."""
    blocks, file = [], ""
    for part in re.split(r"(```python\n.*?```)", PAGE.read_text(), flags=re.DOTALL):
        if part.startswith("```python"):
            blocks.append((file, part.removeprefix("```python\n").removesuffix("```")))
        else:
            file = ([file, *re.findall(r"`(tcl_hf/[\w/]+\.py)`", part)])[-1]
    return [(file, code) for file, code in blocks if not code.startswith("import ")]


def test_the_quoted_lines_stand_in_the_source():
    blocks = quoted()
    assert len(blocks) >= 12
    for file, code in blocks:
        source = (ROOT / file).read_text()
        indented = [textwrap.indent(code, " " * width) for width in range(0, 20, 4)]
        assert any(lines in source for lines in indented), f"{PAGE.name} quotes lines that are not in {file}:\n{code}"
        assert code.count("\n") <= 5, f"more than five lines of {file}"


def test_the_example_of_a_contrastive_loss_prints_what_the_page_shows(tmp_path, capsys):
    found = re.search(r"```python\n(import torch.*?)```\n\n```text\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "example.py").write_text(found[1])
    runpy.run_path(str(tmp_path / "example.py"))
    printed = [float(number) for number in capsys.readouterr().out.split()]
    assert printed == pytest.approx([float(number) for number in found[2].split()], abs=5e-5)


def test_the_measurements_stand_in_the_sources_that_the_page_names():
    table = PAGE.read_text().split("## What was measured here")[1].split("## Limits")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 7
    for _, measurement, source in rows:
        text = (PAGE.parent / re.search(r"\(([^)]+)\)", source)[1]).read_text().replace(" ", "")
        for number in re.findall(r"\d[\d,.]*\d", re.sub(r"@\d+", "", measurement)):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text), (source, number)
