"""The app as a Space of the Hub: its program, the package, the models and the pictures in one repository."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

import tcl_hf_command

from ..data.embedded.openmoji import ATTRIBUTION
from ..recipes.arguments import RecipeError
from ..search import SearchError
from ..search.pictures import pictures_in
from ..search.storage import is_index
from ..sharing.hub import export, push_space

PACKAGE = Path(__file__).parents[1]
EXTRAS = ("app", "search", "demo")
PROGRAM = '''"""Show the app of tcl_hf: `tcl-hf app`."""

from tcl_hf_command import main

main({argv})
'''
CARD = """---
{header}---

# TCL: search, look, ask

Pictures are searched by text or picture, words are located in them, and questions about them are answered. The models
are those of the paper "Vision-Language Pre-Training with Triple Contrastive Learning". `tcl-hf app` shows the same app.
"""


def write_space(target: Path, title: str, folder: str | None, models: list[str]) -> None:
    """Write the files of a Space.

    Args:
        target: an empty folder.
        title: name of the Space.
        folder: pictures to search; those of the demo if None.
        models: folders, which are copied without training state, or names on the Hub, which stay names.

    Raises:
        SearchError: if there are no pictures in the folder.
        HubError: if a model cannot be shared.
    """
    argv = ["app"]
    if folder is not None:
        if is_index(folder):
            raise SearchError(f"{folder} is an index, which a Space makes itself: name the folder of its pictures.")
        pictures = pictures_in(os.path.abspath(folder)).files
        if not pictures:
            raise SearchError(f"{folder} has no pictures: name a folder that has some.")
        for path in pictures:
            copy = target / "pictures" / Path(path).relative_to(os.path.abspath(folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        argv.append("pictures")
    names = []
    for number, model in enumerate(models):
        local = os.path.isdir(model)
        names.append(f"models/{number}-{Path(os.path.abspath(model)).name}" if local else model)
        if local:
            export(model, target / names[-1])
    argv += ["--model", *names, "--host", "0.0.0.0", "--port", "7860"]
    (target / "app.py").write_text(PROGRAM.format(argv=argv))
    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(str(tcl_hf_command.__file__), target / "tcl_hf_command.py")
    (target / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()))
    header: dict[str, Any] = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "app_file": "app.py",
    }
    header |= {"license": "apache-2.0", "models": [model for model in models if not os.path.isdir(model)]}
    card = CARD.format(header=yaml.safe_dump(header, sort_keys=False))
    (target / "README.md").write_text(card + (f"\n{ATTRIBUTION}\n" if folder is None else ""))


def requirements() -> list[str]:
    """The packages that the app needs, as the metadata of this package lists them."""
    found = []
    for line in importlib.metadata.requires("tcl_hf") or []:
        one = Requirement(line)
        wanted = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if wanted and one.name.replace("_", "-") != "tcl-hf":
            found.append(f"{one.name}{one.specifier}")
    return sorted(set(found))


def push_space_of(repo_id: str, folder: str | None, models: list[str], token: str | None = None) -> str:
    """Push the app as a Space, which is created if it does not exist, and return its address.

    Args:
        repo_id: `user/name`.
        folder, models: as for `write_space`.
        token: token of the account; the one saved by `hf auth login` if None.

    Raises:
        HubError: if the Hub refuses it or cannot be reached.
        SearchError: see `write_space`.
        RecipeError: if the name is not `user/name`.
    """
    if repo_id.count("/") != 1:
        raise RecipeError(f"--space {repo_id} is not the name of a Space: write user/name.")
    with tempfile.TemporaryDirectory() as target:
        write_space(Path(target), repo_id.split("/")[1], folder, models)
        return push_space(target, repo_id, token=token).repo_url.url
