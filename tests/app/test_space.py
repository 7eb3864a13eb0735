"""The app is pushed as a Space that holds all it needs: the Hub's real client against a server on loopback."""

import importlib.metadata
import re
import runpy
import sys

import huggingface_hub
import pytest
import yaml
from helpers import png
from hub_server import HubServer

pytest.importorskip("gradio", reason="Gradio is not installed (tcl_hf[app])")
import tcl_hf_command
from tcl_hf.app.space import push_space_of, requirements
from tcl_hf.cli import app as command
from tcl_hf.cli.app import main as app


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    (tmp_path / "pictures" / "a.png").write_bytes(png(1))
    (tmp_path / "pictures" / "below" / "b.png").write_bytes(png(2))
    (tmp_path / "pictures" / "private.txt").write_text("mine")
    return tmp_path / "pictures"


def test_a_space_holds_program_package_model_and_pictures(hub, pictures, model_folders, capsys, monkeypatch, tmp_path):
    model = model_folders["retrieval"]
    app([str(pictures), "--model", str(model), "user/other", "--space", "user/search"])
    assert capsys.readouterr().out.strip().endswith("spaces/user/search")
    files = {name: blob.content for name, blob in hub.repos["spaces/user/search"].find("main").files.items()}
    assert {"pictures/a.png", "pictures/below/b.png", "models/0-retrieval/model.safetensors"} <= files.keys()
    assert "pictures/private.txt" not in files and files["pictures/a.png"] == png(1)
    assert {"app.py", "requirements.txt", "tcl_hf_command.py", "tcl_hf/app/browser.py"} <= files.keys()
    assert not [name for name in files if "__pycache__" in name]
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (header["sdk"], header["app_file"], header["models"]) == ("gradio", "app.py", ["user/other"])
    assert header["sdk_version"] == importlib.metadata.version("gradio") and header["title"] == "search"

    called = []
    monkeypatch.setattr(tcl_hf_command, "main", called.append)
    (tmp_path / "app.py").write_bytes(files["app.py"])
    runpy.run_path(str(tmp_path / "app.py"))
    name, *argv = called[0]
    args = command.parser().parse_args(argv)
    assert name == "app" and args.folder == "pictures" and args.host == "0.0.0.0"
    assert args.model == ["models/0-retrieval", "user/other"]


def test_a_second_push_replaces_the_first(hub, pictures, model_folders):
    push_space_of("user/search", str(pictures), [str(model_folders["retrieval"])])
    (pictures / "a.png").unlink()
    push_space_of("user/search", str(pictures), [str(model_folders["retrieval"])])
    files = hub.repos["spaces/user/search"].find("main").files
    assert "pictures/a.png" not in files and "pictures/below/b.png" in files


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--space", "search"], "--space search is not the name of a Space: write user/name"),
        (["EMPTY", "--space", "user/search"], "has no pictures"),
        (["--space", "other/search"], "other/search"),
        (["--model", "EMPTY", "--space", "user/search"], "cannot be shared"),
    ],
)
def test_what_cannot_be_pushed_is_refused(hub, argv, message, model_folders, tmp_path):
    (tmp_path / "empty").mkdir()
    argv = [str(tmp_path / "empty") if word == "EMPTY" else word for word in argv]
    if "--model" not in argv:
        argv += ["--model", str(model_folders["retrieval"])]
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        app(argv)


def test_the_requirements_are_those_of_the_package():
    listed = {re.split(r"[<>=!~]", line)[0].lower() for line in requirements()}
    assert {"torch", "transformers", "datasets"} <= listed and "tcl_hf" not in listed and sys.version_info >= (3, 11)
    assert not {"pytest", "ruff", "mypy"} & listed
