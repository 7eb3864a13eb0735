"""The page for those who come from the original code: it names everything there, and nothing that is not here."""

import ast
import importlib
import json
import re
import shlex
import shutil
from functools import cache

import pytest
import torch
from helpers import GOLDEN, ROOT, tiny_processor

import tcl_hf
from tcl_hf import TCLForPreTraining
from tcl_hf.cli import convert
from tcl_hf.evaluation.metrics import retrieval_metrics
from tcl_hf.recipes.hints import CONFIG_FIELDS
from tcl_hf.recipes.parsing import COMMANDS, recipe_names
from tcl_hf_command import SUBCOMMANDS

PAGE = ROOT / "docs" / "original.md"
# Names of arguments, config keys, files, functions and classes of both original repositories, at the commits in it.
ORIGINAL = json.loads((ROOT / "tests" / "fixtures" / "original_inventory.json").read_text())


def tables() -> list[list[list[str]]]:
    """The tables of the page: rows of cells, the header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), flags=re.MULTILINE)
    parsed = [[[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in b.splitlines()] for b in blocks]
    return [[rows[0], *rows[2:]] for rows in parsed]


def marked(cell: str) -> list[str]:
    """The texts in code marks of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def comparisons() -> list[list[str]]:
    """The rows of the tables whose last column is ours."""
    ours = ("here", "recipe", "in `metrics.jsonl` or `evaluation.json`")
    return [row for table in tables() if table[0][-1] in ours for row in table[1:]]


@cache
def options() -> frozenset[str]:
    """The arguments of all commands that read recipes."""
    return frozenset(name for command in COMMANDS for name in command.reads) | {"recipe"}


@cache
def texts_in_package() -> frozenset[str]:
    """The literal texts in the code of the package, names of files among them."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tcl_hf").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return frozenset(node.value for node in nodes if isinstance(node.value, str))


def names_in_log() -> set[str]:
    """Losses, and the metrics of an evaluation of retrieval."""
    scores = torch.eye(3)
    recalls = {name for name in retrieval_metrics(scores, scores, torch.arange(3)) if "rank" not in name}
    losses = {"loss_i2t", "loss_t2i", *TCLForPreTraining.loss_names}
    return losses | {f"reranked_{name}" for name in recalls} | {"accuracy", "learning_rate", "reranked_"}


def is_python_name(text: str) -> bool:
    """Whether a dotted name is one of `tcl_hf`, of its modules, or of torch."""
    parts = text.split(".")
    if parts[0] == "torch" or parts[0] in tcl_hf.__all__:
        found = torch if parts[0] == "torch" else getattr(tcl_hf, parts[0])
        parts = parts[1:]
    else:
        paths = [parts[: number + 1] for number in range(len(parts)) if is_module(parts[: number + 1])]
        if not paths:
            return False
        found, parts = importlib.import_module(".".join(["tcl_hf", *paths[-1]])), parts[len(paths[-1]) :]
    for part in parts:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def is_module(parts: list[str]) -> bool:
    return ROOT.joinpath("tcl_hf", *parts).with_suffix(".py").exists()


def exists_here(text: str) -> bool:
    """Whether a text in code marks names something of this package."""
    if text.startswith("tcl-hf "):
        return text.split()[1] in SUBCOMMANDS
    if text.startswith("--"):
        return text.split()[0].removeprefix("--") in options()
    if text.startswith("config."):
        place, _, name = text.rpartition(".")
        return name in CONFIG_FIELDS[place] or f"config.{name}" in CONFIG_FIELDS
    if (ROOT / text).exists() or (ROOT / "tcl_hf" / text).exists() or text in recipe_names() or text in names_in_log():
        return True
    return text.split(":")[0] in options() or text in texts_in_package() or is_python_name(text)


# In the last column, but not names: values, parts of theirs, and other people's.
OTHERS = {
    *("alpha", "itm", "itc", "tokenizers", "ACCELERATE_USE_CPU=true", '{"vqa": ..., "vg": ...}', "tcl_hf"),
    *("from_pretrained(..., image_size=384)", "False", "README.md", "config.json", "model.safetensors"),
}


def test_what_the_page_names_here_exists():
    rows = comparisons()
    assert len(rows) > 150
    named = {text for row in rows for text in marked(row[-1])}
    missing = sorted(text for text in named - OTHERS if not exists_here(text))
    assert not missing, missing


def test_a_name_that_does_not_exist_is_noticed():
    wrong = ("--k_test", "config.temp", "models.losses.nce_loss", "TCLModel.rank", "recipes/none.py", "tcl_5m")
    assert not [text for text in wrong if exists_here(text)]


def first_columns(header: str) -> set[str]:
    """The names in the first column of all tables that have a header there."""
    return {text for table in tables() if table[0][0] == header for row in table[1:] for text in marked(row[0])}


def test_every_argument_and_config_key_of_the_original_is_there():
    assert first_columns("argument") == set(ORIGINAL["arguments"])
    assert first_columns("key") == set(ORIGINAL["keys"])


def test_every_file_of_the_original_is_there():
    everywhere = {text.split()[0] for row in comparisons() for text in marked(row[0])}
    assert set(ORIGINAL["files"]) <= everywhere


def test_every_public_function_and_class_of_the_original_is_there():
    described: dict[str, set[str]] = {}
    for table in tables():
        if table[0][:2] == ["file", "function or class"]:
            for files, names, _ in table[1:]:
                for file in marked(files):
                    described.setdefault(file, set()).update(marked(names))
    for file, names in ORIGINAL["names"].items():
        assert set(names) <= described.get(file, set()), (file, set(names) - described.get(file, set()))
    everywhere = {name for names in ORIGINAL["names"].values() for name in names}
    assert {name for names in described.values() for name in names} <= everywhere


def test_converting_prints_what_the_page_shows_and_the_folder_opens_as_it_says(tmp_path, monkeypatch, capsys):
    """Numbers are compared to 4 digits, because other processors round differently."""
    blocks = dict(
        re.findall(r"```bash\n(tcl-hf convert [^\n]*)\n```\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    )
    assert len(blocks) == 2
    shutil.copy(GOLDEN / "pretrain.pth", tmp_path)
    monkeypatch.chdir(tmp_path)
    for command, shown in blocks.items():
        convert.main(shlex.split(command)[2:])
        printed = capsys.readouterr().out.splitlines()
        for line, expected in zip(printed, shown.splitlines(), strict=True):
            words, wanted = line.split(), expected.split()
            numbers = [word for word in wanted if re.fullmatch(r"-?0\.\d{4,}", word)]
            if numbers:
                assert words[:-1] == wanted[:-1] and float(words[-1]) == pytest.approx(float(wanted[-1]), rel=1e-4)
            else:
                assert words == wanted
    original, back = (torch.load(file, weights_only=True)["model"] for file in ("pretrain.pth", "back.pth"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
    tiny_processor().save_pretrained("models/tiny")
    opens = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(opens.replace("models/tcl_4m", "models/tiny"), names)
    assert names["model"].teacher is None and names["processor"].tokenizer is not None
