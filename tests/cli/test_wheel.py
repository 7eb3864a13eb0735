"""Every command and every Python snippet of README and docs runs from an installed wheel, in an empty folder, offline.

Four rules make them short. A launcher of processes is left out, and its program runs in one process. Words in capitals
and names of data and weights stand for small ones (`STAND_INS`). Training takes two steps of small batches from tiny
encoders, and evaluation a few images (`limits_of`). Snippets of a page run one after the other, after the lines in
`BEFORE` that make the variables which they take for granted. A Hub on loopback holds what comes from the Hub.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from datasets import Image as ImageColumn
from datasets import Value
from documented import OURS, PAGES, commands_of, shell_lines_of, snippets_of, words_of
from helpers import GOLDEN, ROOT, WORDS, photo, png, tiny, tiny_config, tiny_records, write_table
from hub_server import HubServer
from huggingface_hub import HfApi
from transformers import BertConfig, BertModel, BertTokenizer, Dinov2Config, Dinov2Model

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.recipes.arguments import FinetuningDataArguments
from tcl_hf.recipes.model_folder import write_task
from tcl_hf.sharing.convert import write_original

# Lines of shell blocks that are not run, by how they begin, and why.
PASSED_OVER = {
    "tail ": "shows a file of a run",
    "head ": "shows a file of a run",
    "make demo": "works in a clone, and runs `tcl-hf demo`, which is run first",
    "make test": "works in a clone",
    "pip install": "needs a package index",
    "curl localhost": "asks the service, as tests of its own do",
    "docker ": "needs Docker",
    "python benchmarks/": "works in a clone, and takes minutes",
    "img2dataset": "another program, which needs the network",
    "srun": "needs Slurm",
    "export RANK": "a part of a job of Slurm",
    "export": "a part of a job of Slurm",
    "out=": "a part of a job of Slurm",
    "resume=": "a part of a job of Slurm",
    "exec python -m tcl_hf pretrain": "a part of a job of Slurm, with the words of its shell",
    "code=": "a part of a job of Slurm",
    "if [": "a part of a job of Slurm",
    "exit": "a part of a job of Slurm",
}
# Commands that are not run, and why.
NAMES_ALONE = {"finetune", "evaluate", "search", "index", "filter", "convert", "push"}  # names of commands in prose
SERVERS = {"app", "serve"}  # They run until they are stopped; tests of their own start and stop them.
# Pages whose Python quotes the package, and is compared with it by a test of its own.
PAGES_OF_QUOTES = {"how_tcl_works.md"}
# Snippets that are not run, by a word of theirs, and why.
PASSED_OVER_SNIPPETS = {
    "ray.train": "needs a cluster of Ray",
    "whole_state_dict": "needs processes with an accelerator",
}

# What stands for the value of an option.
STAND_INS = {
    ("--data", "FOLDER"): "stand-ins/data",
    ("--data", "SOURCE"): "photos.csv",
    ("data", "SOURCE"): "photos.csv",
    ("--model", "FOLDER"): "stand-ins/model",
    ("--model", "CHECKPOINT"): "runs/openmoji_scratch",
    ("--vision_model", "FOLDER"): "stand-ins/vision",
    ("--text_model", "FOLDER"): "stand-ins/text",
    ("recipes", "NAME"): "openmoji_scratch",
    ("--recipe", "NAME"): "scenes_entailment",
    ("--recipe", "RECIPE"): "openmoji_scratch",
    ("--recipe", "FILE"): "mine.yaml",
}
BEFORE = {
    "grounding.md": """
from PIL import Image
from transformers import AutoProcessor
from tcl_hf import TCLForImageTextRetrieval
image, caption = Image.open("photo.jpg"), "a lion near a tree"
processor = AutoProcessor.from_pretrained("stand-ins/model")
model = TCLForImageTextRetrieval.from_pretrained("stand-ins/model", use_momentum_teacher=False)
""",
    "question_answering.md": """
from PIL import Image
from transformers import AutoProcessor
from tcl_hf import TCLForQuestionAnswering
processor = AutoProcessor.from_pretrained("runs/easy_vqa")
model = TCLForQuestionAnswering.from_pretrained("runs/easy_vqa", use_momentum_teacher=False)
inputs = processor(images=Image.open("photo.jpg"), text="what is this?", return_tensors="pt")
from transformers import BatchEncoding
ids, mask = processor.encode_answers(["red", "circle", "yes"])
candidates = BatchEncoding({"input_ids": ids, "attention_mask": mask})
""",
    "pipelines.md": """
from datasets import load_dataset
dataset = load_dataset("imagefolder", data_dir="photos", split="train")
""",
    "hub.md": """
from tcl_hf.sharing.hub import push
push("runs/openmoji_scratch", "user/run", training_state=True)
push("runs/openmoji", "user/name", with_code=True)
""",
}


def limits_of(words: list[str]) -> list[str]:
    """The options that make a command short."""
    name = words[0]
    if name == "evaluate":
        return ["--eval_images", "8"]
    if name not in ("pretrain", "finetune", "demo"):
        return []
    limits = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8"]
    limits += ["--dataloader_num_workers", "0", "--eval_images", "8", "--bf16", "false"]
    if name == "finetune":
        return limits
    limits += ["--eval_k", "4"]
    if "flickr8k_small" in words or {"--data", "--recipe"}.isdisjoint(words) or "--tuning_images" in words:
        limits += ["--tuning_images", "8"]
    if "openmoji_scratch" in words or "mine.yaml" in words:
        return [*limits, "--save_steps", "1"]  # so that there is a checkpoint to continue from
    # The embedded pictures, which are many, are read by the recipe openmoji_scratch, and 16 stand for them elsewhere.
    if name == "pretrain" and {"--data", "--recipe"}.isdisjoint(words):
        limits += ["--recipe", "openmoji"]
    limits += [] if "--data" in words else ["--data", "stand-ins/data"]
    if not any(word.startswith("package:") for word in words):
        limits += ["--image_size", "16"]
        limits += [] if "--vision_model" in words else ["--vision_model", "stand-ins/vision"]
        limits += [] if "--text_model" in words else ["--text_model", "stand-ins/text"]
    return limits


def short(words: list[str]) -> list[str]:
    """A command with stand-ins and limits."""
    replaced = [STAND_INS.get((before, word), word) for before, word in zip(["", *words], words, strict=False)]
    return [*replaced, *limits_of(replaced)]


def is_passed_over(words: list[str]) -> bool:
    """Whether a command is not run: for a reason above, or because its recipe names data of the paper.

    That data cannot be shared. Tests of `data/annotations` read files in its formats, and the recipes are parsed.
    """
    if (len(words) == 1 and words[0] in NAMES_ALONE) or words[0] in SERVERS:
        return True
    of_slurm = bool({"$resume", "recipes/cc12m.yaml"} & set(words))
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    of_paper = words[0] in ("pretrain", "finetune", "evaluate") and recipe.startswith("tcl_")
    return of_slurm or (of_paper and {"--data", "--validation_data"}.isdisjoint(words))


def steps_of(page: Path) -> list[dict]:
    """The steps of a page, in its order: shell blocks and marks, and then its Python."""
    steps = []
    for line in shell_lines_of(page):
        if line.startswith("python -c "):
            steps.append({"name": f"{page.name}: {line}", "code": line.split("'")[1]})
    for words in commands_of(page):
        if not is_passed_over(words):
            # A conversion refuses a folder that an earlier one has filled.
            anew = [words[2]] if words[0] == "convert" and "--to-original" not in words else []
            steps.append({"name": f"{page.name}: tcl-hf {' '.join(words)}", "words": short(words), "anew": anew})
    if page.name in PAGES_OF_QUOTES:
        return steps
    snippets = [code for code in snippets_of(page) if not any(word in code for word in PASSED_OVER_SNIPPETS)]
    if page.name == "interoperability.md":  # Its snippets begin anew each.
        return steps + [{"name": f"{page.name}: snippet {n}", "code": code} for n, code in enumerate(snippets)]
    if snippets:
        steps.append({"name": f"{page.name}: its Python", "code": BEFORE.get(page.name, "") + "\n".join(snippets)})
    return steps


def all_steps() -> list[dict]:
    """Each step once: commands first, then Python, which opens what they have made, then what continues a run."""

    def turn(step: dict) -> int:
        return 3 if "runs/continued" in step.get("words", ()) else 2 * ("python -c" in step["name"]) or "code" in step

    seen: set[str] = set()
    steps = [{"name": "make demo", "words": short(["demo"])}]
    for step in sorted((step for page in PAGES for step in steps_of(page)), key=turn):
        key = json.dumps([step.get("words"), step.get("code")])
        if key not in seen:
            steps.append(step)
        seen.add(key)
    return steps


def test_every_line_of_the_pages_is_run_or_passed_over_for_a_reason():
    for page in PAGES:
        for line in shell_lines_of(page):
            run = bool(OURS.search(line) and words_of(line)) or line.startswith("python -c ")
            assert run or line.startswith(tuple(PASSED_OVER)), f"{page.name}: {line}"
    lines = [line for page in PAGES for line in shell_lines_of(page)]
    assert all(any(line.startswith(start) for line in lines) for start in PASSED_OVER)
    code = "".join(snippet for page in PAGES for snippet in snippets_of(page))
    assert all(word in code for word in PASSED_OVER_SNIPPETS)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel, and the packages of this one without the editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "tcl_hf_command.py"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "tcl_hf", source / "tcl_hf", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run([*pip, "--python", str(python), "install", *options, str(wheel)], cwd=folder)
    # A .pth file adds a folder, but does not read the .pth files in it, such as that of an editable install.
    places = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).stdout
    Path(places.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def write_stand_ins(folder: Path) -> None:
    """Small data and tiny weights under the names that the pages use."""
    torch.manual_seed(0)
    (folder / "photos").mkdir()
    rows = ["image,caption"]
    for number in range(16):
        (folder / "photos" / f"{number}.png").write_bytes(png(number))
        rows.append(f"photos/{number}.png,a {WORDS[1 + number % 9]} dog near the {WORDS[number]}")
    for name in ("photos.csv", "more.csv"):
        (folder / name).write_text("\n".join(rows) + "\n")
    photo().save(folder / "photo.jpg")
    (folder / "mine.yaml").write_text((ROOT / "tcl_hf/recipes/openmoji_scratch.yaml").read_text())
    stand_ins = folder / "stand-ins"
    (stand_ins / "data").mkdir(parents=True)
    records = tiny_records(16)
    table = {"image": [record["image"] for record in records], "captions": [record["captions"] for record in records]}
    for split in ("train", "validation"):
        features = {"image": ImageColumn(), "captions": [Value("string")]}
        write_table(stand_ins / "data" / f"{split}.parquet", table, features)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
    Dinov2Model(Dinov2Config(image_size=16, patch_size=2, num_hidden_layers=2, **sizes)).save_pretrained(
        stand_ins / "vision"
    )
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertModel(BertConfig(vocab_size=len(vocabulary), num_hidden_layers=12, **sizes)).save_pretrained(stand_ins / "text")
    BertTokenizer(vocabulary).save_pretrained(stand_ins / "text")
    model, processor = tiny(TCLForImageTextRetrieval)
    model.save_pretrained(stand_ins / "model")
    processor.save_pretrained(stand_ins / "model")
    write_task(stand_ins / "model", FinetuningDataArguments(task="retrieval", data=["photos.csv"]))
    wide = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    original = TCLForPreTraining(tiny_config(vision_config=wide, text_config=wide | {"vocab_size": len(vocabulary)}))
    original.save_pretrained(stand_ins / "original")
    write_original(stand_ins / "original", folder / "TCL_4M.pth")
    shutil.copy(GOLDEN / "pretrain.pth", folder / "pretrain.pth")
    write_benchmarks(folder)


def write_benchmarks(folder: Path) -> None:
    """Files in the formats of Flickr30k and of ImageNet."""
    (folder / "flickr30k-images").mkdir()
    images = []
    for number in range(8):
        (folder / "flickr30k-images" / f"{number}.jpg").write_bytes(png(number))
        raw = [f"a {WORDS[number + n]} dog" for n in range(5)]
        sentences = [{"raw": text, "imgid": number, "sentid": 5 * number + n} for n, text in enumerate(raw)]
        images.append({"filename": f"{number}.jpg", "imgid": number, "split": "test", "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    names = {"n01440764": "tench", "n01443537": "goldfish"}
    for number, label in enumerate(names):
        (folder / "imagenet" / "val" / label).mkdir(parents=True)
        for copy in range(2):
            (folder / "imagenet" / "val" / label / f"{copy}.JPEG").write_bytes(png(10 * number + copy))
    (folder / "imagenet_names.json").write_text(json.dumps(names))


def fill(hub: HubServer, folder: Path) -> None:
    """Tiny weights under the names of those on the Hub."""
    for repo, part in {
        "google-bert/bert-base-uncased": "text",
        "google-bert/bert-base-multilingual-cased": "text",
        "facebook/dinov2-base": "vision",
    }.items():
        owner = repo.split("/")[0]
        hub.users[f"hf_{owner}"] = owner
        api = HfApi(endpoint=hub.endpoint, token=f"hf_{owner}")
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=folder / "stand-ins" / part)


@pytest.mark.slow
def test_the_command_is_installed_and_says_its_version(python, tmp_path):
    assert run([str(python.with_name("tcl-hf")), "--version"], cwd=tmp_path).stdout.startswith("tcl-hf ")


@pytest.mark.slow
def test_every_command_and_snippet_runs_from_a_wheel(python, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    write_stand_ins(folder)
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps(all_steps()))
    program = tmp_path / "steps.py"  # a copy, because its folder is on the path of modules
    shutil.copy(ROOT / "tests" / "cli" / "steps.py", program)
    with HubServer() as hub:
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        fill(hub, folder)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "ACCELERATE_USE_CPU": "true"}
        run([str(python), str(program), str(steps)], cwd=folder, **environment)
    found = json.loads((tmp_path / "results.json").read_text())
    assert Path(found["package"]).is_relative_to(python.parents[1]), found["package"]
    failed = [
        f"{one['name']} ended with {one['status']}:\n{one['output']}" for one in found["results"] if one["status"]
    ]
    assert not failed, "\n\n".join(failed)
