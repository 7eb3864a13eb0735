"""The command `tcl-hf`: its subcommands, its list of recipes, and the completion of shells."""

import importlib
import os
import subprocess
import sys

import pytest
from helpers import ROOT

import tcl_hf
import tcl_hf_command as program
from tcl_hf.recipes.parsing import RECIPES, parse_recipe, recipe_names


def run(capsys, *argv: str) -> str:
    program.main(list(argv))
    return capsys.readouterr().out


def test_it_lists_its_subcommands_and_says_its_version(capsys):
    text = run(capsys)
    assert text == run(capsys, "--help") == run(capsys, "-h")
    assert all(f"\n  {name} " in text for name in program.SUBCOMMANDS)
    assert run(capsys, "--version") == f"tcl-hf {tcl_hf.__version__}\n"


def test_lists_and_the_version_appear_before_anything_heavy_is_imported(tmp_path):
    asked = "import sys, tcl_hf_command as program; [program.main([one]) for one in ('--help', '--version', 'recipes')]"
    heavy = "print(sorted({'tcl_hf', 'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{asked}; {heavy}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "openmoji_scratch  " in done.stdout


@pytest.mark.parametrize("name", program.SUBCOMMANDS)
def test_every_subcommand_has_a_help_that_names_it(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main([name, "--help"])
    expected = "pretrain" if name == "demo" else name
    assert stopped.value.code == 0 and f"usage: tcl-hf {expected} " in capsys.readouterr().out


def test_an_unknown_subcommand_is_refused_with_a_hint(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["fine-tune", "--recipe", "easy_vqa"])
    message = "error: There is no command 'fine-tune' (did you mean 'finetune'?): `tcl-hf --help` lists them.\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == message


def test_recipes_are_listed_with_a_line_each(capsys):
    lines = run(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == recipe_names() == sorted(f.stem for f in RECIPES.glob("*.yaml"))
    of = dict(line.split(maxsplit=1) for line in lines)
    assert of["tcl_4m"].startswith("The paper's pre-training (Yang et al., CVPR 2022")
    assert all(len(summary) > 30 for summary in of.values())


def test_a_printed_recipe_is_one_to_start_from(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(run(capsys, "recipes", "tcl_snli_ve"))
    command = importlib.import_module("tcl_hf.recipes.parsing").FINETUNE
    assert parse_recipe(command, ["--recipe", str(mine)]) == parse_recipe(command, ["--recipe", "tcl_snli_ve"])
    assert run(capsys, "recipes", "tcl_snli_ve", "--path").strip() == str(RECIPES / "tcl_snli_ve.yaml")
    with pytest.raises(SystemExit, match=r"^error: There is no recipe nonsense: choose one of daquar, "):
        program.main(["recipes", "nonsense"])


def test_the_completion_is_a_script_that_bash_reads(capsys):
    script = run(capsys, "completion", "bash")
    assert "--learning_rate" in script and "(demo pretrain " in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0 and not checked.stderr


def test_the_demo_is_the_recipe_of_the_embedded_data(monkeypatch):
    demo, pretrain = (importlib.import_module(f"tcl_hf.cli.{name}") for name in ("demo", "pretrain"))
    given = []
    monkeypatch.setattr(pretrain, "main", given.append)
    demo.main(["--max_steps", "3"])
    demo.main(["--output_dir", "mine"])
    replaced = ["--overwrite_output_dir", "true"]  # its own folder only, so that the command can be typed twice
    assert given == [
        ["--recipe", "openmoji", *replaced, "--max_steps", "3"],
        ["--recipe", "openmoji", "--output_dir", "mine"],
    ]
