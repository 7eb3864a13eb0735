"""Every command of README and docs is one that `tcl-hf` takes: its options exist, and so do the recipes it names."""

import importlib

import pytest
from documented import PAGES, commands_of

from tcl_hf.recipes import parsing
from tcl_hf.recipes.parsing import COMMANDS, parse_recipe, recipe_names
from tcl_hf_command import SUBCOMMANDS

DOCUMENTED = sorted({tuple(words) for page in PAGES for words in commands_of(page)})


def test_the_pages_show_commands():
    assert len(DOCUMENTED) > 30 and {"pretrain", "finetune", "evaluate", "data", "push"} <= {w[0] for w in DOCUMENTED}


@pytest.mark.parametrize("words", DOCUMENTED, ids=" ".join)
def test_a_documented_command_is_understood(words, monkeypatch):
    name, *argv = words
    if name in ("--help", "--version"):
        return
    assert name in SUBCOMMANDS, name
    command = next((one for one in COMMANDS if one.name == name), None)
    if command is None:
        if name != "demo":
            importlib.import_module(f"tcl_hf.cli.{name}").parser().parse_args([w for w in argv if w not in "[]"])
        return
    monkeypatch.setattr(parsing, "read_task", lambda model, names_data: {"task": "retrieval"})
    if "--recipe" in argv:
        recipe = argv[argv.index("--recipe") + 1]
        if recipe.isupper() or recipe.endswith(".yaml"):  # the reader's own
            argv = [word for word in argv if word not in ("--recipe", recipe)]
        else:
            assert recipe in recipe_names(), recipe
    parse_recipe(command, [word for word in argv if word not in ("[", "]", "$resume", "$@")])
