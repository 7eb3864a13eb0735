"""Models that are pushed open elsewhere with the same outputs: the Hub's real client against a server on loopback."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import losses, questions, small_patches, tiny_processor, tiny_run, training_batch, write_json
from hub_server import HubServer

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
    TCLProcessor,
)
from tcl_hf.cli.evaluate import main as evaluate
from tcl_hf.models.checksums import checksum
from tcl_hf.recipes.arguments import FinetuningDataArguments
from tcl_hf.recipes.model_folder import write_task
from tcl_hf.sharing.cards import plain_card
from tcl_hf.sharing.convert import open_saved
from tcl_hf.sharing.hub import CODE, BackgroundPush, HubError, export, pull, push
from tcl_hf.training.adapters import ADAPTER_CONFIG, add_lora, config_of, open_checkpoint, save_adapted
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.checkpoints import FORMAT, MANIFEST, newest_checkpoint

CLASSES = [
    TCLModel,
    TCLForPreTraining,
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForQuestionAnswering,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLForTextAssignment,
]
CARD = "---\nlicense: apache-2.0\n---\n# A card\n"


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A server, and a client that connects to it only, with its owner's token and a cache in a folder of the test."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)  # PEFT's client
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    # transformers keeps a client with the address of its first use, and waits half a minute if that is gone.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.recover()
    server.requests.clear()
    return server


@pytest.fixture
def repo(server) -> str:
    """A new name for each test, because transformers remembers the names that it has resolved."""
    return f"user/tiny-{len(server.repos)}"


@pytest.fixture
def processor() -> TCLProcessor:
    return tiny_processor()


def save(model_class, folder: Path, processor, **fields):
    """Write a run's folder: random weights with a teacher unlike its student, a card, a picture and private files."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = small_patches(text_config=text, **fields)
    model = model_class(config).eval()
    if getattr(model, "teacher", None) is not None:
        with torch.no_grad():
            for parameter in model.teacher.parameters():
                parameter.add_(0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "training.png").write_bytes(b"\x89PNG\0")
    (folder / "notes.txt").write_text("mine")
    save_state(folder / "checkpoints/step-00000001")
    return model


def save_state(checkpoint: Path) -> None:
    """A checkpoint with one file, and a manifest of it."""
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.safetensors").write_bytes(b"\0" * 1000)
    listed = {"optimizer.safetensors": [1000, hashlib.sha256(b"\0" * 1000).hexdigest()]}
    manifest = {"format": FORMAT, "step": 1, "num_processes": 1, "identity": {}, "files": listed}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def features(model) -> dict[str, torch.Tensor]:
    """All outputs for a batch that the model's class can compute."""
    batch = training_batch(2, config=model.config)
    tcl = model.base_model
    with torch.no_grad():
        image, text = tcl.encode_image(batch["pixel_values"]), tcl.encode_text(batch["input_ids"])
        images = (image,) * model.config.text_config.images_per_text
        fused = tcl.text_model(batch["input_ids"], encoder_hidden_states=images).last_hidden_state
        outputs = {"image": tcl.image_features(image), "text": tcl.text_features(text), "fused": fused}
        for head in ("itm_head", "cls_head", "ta_head", "lm_head"):
            if hasattr(model, head):
                outputs[head] = getattr(model, head)(fused)
        if hasattr(model, "text_decoder"):
            outputs["answer"] = model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=3)
    return outputs


def assert_same(computed, expected):
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(computed[name], value), name


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_class_is_pushed_and_opens_with_the_same_outputs(hub, repo, processor, model_class, tmp_path):
    model = save(model_class, tmp_path / "run", processor)
    push(tmp_path / "run", repo)
    files = hub.repos[repo].find("main").files
    assert files["README.md"].content.decode() == CARD
    assert not {name for name in files if "checkpoints" in name or name == "notes.txt" or name.endswith(".py")}

    opened = model_class.from_pretrained(repo).eval()
    assert not opened.config.use_momentum_teacher and getattr(opened, "teacher", None) is None
    assert_same(features(opened), features(model))
    again = TCLProcessor.from_pretrained(repo)
    assert again(text="a red dog!") == processor(text="a red dog!")


def test_push_and_pull_of_transformers_work_too(hub, repo, processor, tmp_path):
    model = save(TCLForPreTraining, tmp_path / "run", processor)
    model.push_to_hub(repo)
    processor.push_to_hub(repo)
    opened = TCLForPreTraining.from_pretrained(repo)
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    assert TCLProcessor.from_pretrained(repo)(text="a red dog") == processor(text="a red dog")


def test_training_state_is_pulled_as_it_was_pushed(hub, repo, processor, tmp_path):
    model = save(TCLForPreTraining, tmp_path / "run", processor)
    push(tmp_path / "run", repo, training_state=True)
    pull(repo, tmp_path / "other")
    opened = open_saved(tmp_path / "other")
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    state = "checkpoints/step-00000001/optimizer.safetensors"
    assert (tmp_path / "other" / state).read_bytes() == (tmp_path / "run" / state).read_bytes()


@pytest.fixture
def adapted(processor, tmp_path):
    """A base model's folder, the folder of a run that trained adapters of it, and the run's model."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    save(TCLForVisualEntailment, tmp_path / "base", processor)
    model = TCLForVisualEntailment.from_pretrained(tmp_path / "base")
    add_lora(model, TCLTrainingArguments(lora={"r": 2}, lora_save="adapter"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapted(model, tmp_path / "adapters", "adapter")
    processor.save_pretrained(tmp_path / "adapters")
    return tmp_path / "base", tmp_path / "adapters", model


def logits(model, seed: int = 0) -> torch.Tensor:
    batch = training_batch(3, config=model.config, seed=seed)
    with torch.no_grad():
        return model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits


def test_adapters_are_pushed_and_open_with_the_base_model_of_the_hub(hub, repo, adapted, tmp_path):
    from peft import PeftModel

    base, folder, model = adapted
    expected = logits(model)
    base_repo = f"{repo}-base"
    push(base, base_repo)
    push(folder, repo, base_model=base_repo)
    files = hub.repos[repo].find("main").files
    assert {"adapter_config.json", "adapter_model.safetensors", "model_config.json", "SHA256SUMS"} <= files.keys()
    assert not {"config.json", "model.safetensors"} & files.keys()
    card = huggingface_hub.ModelCard(files["README.md"].content.decode())
    about = (card.data.library_name, card.data.base_model, card.data.base_model_relation)
    assert about == ("peft", base_repo, "adapter")
    assert {"lora", "transformers", f"base_model:adapter:{base_repo}"} < set(card.data.tags)
    assert f'open_checkpoint("{repo}", TCLForVisualEntailment, config)' in card.text

    pull(repo, tmp_path / "pulled")
    for name in (repo, str(tmp_path / "pulled")):
        opened = open_checkpoint(name, TCLForVisualEntailment, config_of(name, use_momentum_teacher=False))
        torch.testing.assert_close(logits(opened), expected, rtol=1e-5, atol=1e-6)
        plain = TCLForVisualEntailment.from_pretrained(base_repo)
        assert torch.equal(logits(PeftModel.from_pretrained(plain, name)), expected)
    assert torch.equal(logits(TCLForVisualEntailment.from_pretrained(repo)), expected)


def test_a_push_of_adapters_replaces_a_whole_model_and_the_reverse(hub, repo, adapted):
    base, folder, _ = adapted
    push(base, repo)
    push(folder, repo, base_model="user/elsewhere")
    assert not {"config.json", "model.safetensors"} & hub.repos[repo].find("main").files.keys()
    push(base, repo)
    files = hub.repos[repo].find("main").files
    assert not {name for name in files if "adapter" in name} and "config.json" in files


def test_adapters_of_a_local_model_are_not_pushed_without_its_repository(adapted, tmp_path):
    base, folder, _ = adapted
    with pytest.raises(HubError, match=r"holds adapters of .*base, a folder of this machine: push that model first"):
        export(folder, tmp_path / "out")
    with pytest.raises(HubError, match="open with the code of their base model: leave out with_code"):
        export(folder, tmp_path / "out", base_model="user/base", with_code=True)
    with pytest.raises(HubError, match="holds a whole model, which needs no base_model"):
        export(base, tmp_path / "out", base_model="user/base")
    assert not (tmp_path / "out").exists()


def test_a_push_of_the_same_content_makes_no_commit(hub, repo, processor, tmp_path):
    save(TCLForPreTraining, tmp_path / "run", processor)
    first = push(tmp_path / "run", repo, with_code=True)
    number = len(hub.repos[repo].commits)
    again = push(tmp_path / "run", repo, with_code=True)
    assert len(hub.repos[repo].commits) == number and again.oid == first.oid


def test_an_interrupted_push_continues_where_it_stopped(hub, repo, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model = save(TCLForPreTraining, tmp_path / "run", processor)
    hub.fail_after(2, status=403)
    with pytest.raises(HubError, match="Files that were sent stay there: push again to send the rest"):
        push(tmp_path / "run", repo, max_shard_size="100KB")
    assert [commit.title for commit in hub.repos[repo].commits] == ["initial commit"]  # no commit of a part
    sent = set(hub.repos[repo].objects)
    assert sent
    hub.recover()
    hub.requests.clear()
    push(tmp_path / "run", repo, max_shard_size="100KB")
    put = {path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "PUT"}
    assert put and not put & sent
    assert_same(features(TCLForPreTraining.from_pretrained(repo).eval()), features(model))


def test_a_later_push_removes_the_shards_of_an_earlier_one(hub, repo, processor, tmp_path):
    save(TCLForPreTraining, tmp_path / "run", processor)
    push(tmp_path / "run", repo, max_shard_size="100KB")
    shards = {name for name in hub.repos[repo].find("main").files if name.endswith(".safetensors")}
    assert len(shards) > 1
    push(tmp_path / "run", repo)
    files = hub.repos[repo].find("main").files
    assert {name for name in files if "safetensors" in name} == {"model.safetensors"}


def test_branches_pull_requests_and_messages(hub, repo, processor, tmp_path):
    save(TCLForImageTextRetrieval, tmp_path / "run", processor)
    push(tmp_path / "run", repo, commit_message="the first")
    other = save(TCLForImageTextRetrieval, tmp_path / "other", processor, temperature_init_value=0.2)
    push(tmp_path / "other", repo, revision="warm")
    proposed = push(tmp_path / "other", repo, create_pr=True)
    pushed = hub.repos[repo]
    assert pushed.log("main")[0].title == "the first" and proposed.pr_url
    assert {"refs/heads/main", "refs/heads/warm", "refs/pr/1"} <= pushed.refs.keys()
    for revision in ("warm", "refs/pr/1", pushed.find("warm").id):
        opened = TCLForImageTextRetrieval.from_pretrained(repo, revision=revision)
        assert torch.equal(opened.tcl.temperature, other.tcl.temperature)
    assert TCLForImageTextRetrieval.from_pretrained(repo).tcl.temperature.item() == pytest.approx(0.07)


def test_a_private_repository_opens_only_with_its_token(hub, repo, processor, tmp_path, monkeypatch):
    save(TCLModel, tmp_path / "run", processor)
    push(tmp_path / "run", repo, private=True)
    assert hub.repos[repo].private
    pull(repo, tmp_path / "mine")
    for token in (hub.other_token, "hf_wrong", False):
        with pytest.raises(HubError, match="user/tiny") as refused:
            pull(repo, tmp_path / "theirs", token=token)
        assert "\n" not in str(refused.value) and "token" in str(refused.value)
        with pytest.raises(OSError, match="user/tiny"):
            TCLModel.from_pretrained(repo, token=token, cache_dir=tmp_path / f"cache{token}")
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    with pytest.raises(HubError, match="token"):
        push(tmp_path / "run", repo, token="hf_wrong")


def test_errors_name_what_is_missing(hub, repo, processor, tmp_path, monkeypatch):
    save(TCLModel, tmp_path / "run", processor)
    push(tmp_path / "run", repo)
    with pytest.raises(HubError, match="has no revision 'v9'"):
        pull(repo, tmp_path / "out", revision="v9")
    with pytest.raises(HubError, match="There is no repository user/none, or it is private"):
        pull("user/none", tmp_path / "out")
    with pytest.raises(HubError, match=r"empty cannot be shared: .* cannot be opened"):
        push(tmp_path / "empty", repo)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(HubError, match="holds a 'bert' model and not a TCL"):
        push(tmp_path / "bert", repo)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(HubError, match="The Hub cannot be reached for user/tiny"):
        push(tmp_path / "run", repo)
    with pytest.raises(HubError, match="The Hub cannot be reached for user/tiny"):
        pull(repo, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_without_a_card_gets_one_and_a_widget_gets_its_address(hub, repo, processor, tmp_path):
    save(TCLForMaskedLM, tmp_path / "run", processor)
    (tmp_path / "run/README.md").unlink()
    push(tmp_path / "run", repo)
    text = hub.repos[repo].find("main").files["README.md"].content.decode()
    assert "TCLForMaskedLM.from_pretrained" in text and "Nothing was measured" in text
    (tmp_path / "run/README.md").write_text("---\nwidget:\n- src: example.png\n  text: is it red?\n---\n# A card\n")
    push(tmp_path / "run", repo)
    text = hub.repos[repo].find("main").files["README.md"].content.decode()
    assert f"src: {hub.endpoint}/{repo}/resolve/main/example.png\n" in text


def test_a_pushed_card_opens_the_model_by_its_name_on_the_hub(hub, repo, processor, tmp_path):
    save(TCLForImageTextRetrieval, tmp_path / "run", processor)
    plain_card("run", TCLForImageTextRetrieval, None).write(tmp_path / "run")
    push(tmp_path / "run", repo)
    card = hub.repos[repo].find("main").files["README.md"].content.decode()
    assert f'TCLForImageTextRetrieval.from_pretrained("{repo}", use_momentum_teacher=False)' in card
    assert f'TCLProcessor.from_pretrained("{repo}")' in card and "`pip install tcl_hf`" in card
    assert '("run"' not in card and '("run"' in (tmp_path / "run/README.md").read_text()


def test_a_model_on_the_hub_is_evaluated_by_its_name_and_brings_task_and_answers(hub, repo, processor, tmp_path):
    save(TCLForQuestionAnswering, tmp_path / "run", processor)
    write_task(tmp_path / "run", FinetuningDataArguments(task="question_answering", eval_k=2))
    (tmp_path / "run" / "answers.json").write_text('["red", "green", "big cat"]')
    push(tmp_path / "run", repo)
    rows = [row | {"image": f"{row['image_id']}.png"} for row in questions(4)]
    for row, record in zip(rows, questions(4), strict=True):
        (tmp_path / row["image"]).write_bytes(record["image"]["bytes"])
    source = write_json(tmp_path, rows)
    with contextlib.chdir(tmp_path):
        evaluate(["--model", repo, "--data", source])
        folder = tmp_path / "runs" / repo.replace("/", "_")
        result = json.loads((folder / "evaluation.json").read_text())
        assert (result["task"], result["k"]) == ("question_answering", 2) and "accuracy" in result["metrics"]
        assert len(json.loads((folder / "vqa_results.json").read_text())) == 4
        assert not (tmp_path / "user").exists()
        (folder / "vqa_results.json").unlink()
        evaluate(["--model", repo, "--data", source, "--eval_images", "2"])  # a quick look is not for a server
        assert not (folder / "vqa_results.json").exists()


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_listed_files_are_shared_and_no_link_leaves_the_folder(processor, tmp_path):
    save(TCLForPreTraining, tmp_path / "run", processor)
    (tmp_path / "secret").write_text("token")
    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    for link in ("leak.png", "LICENSE", "checkpoints/step-00000001/more.bin"):
        (tmp_path / "run" / link).symlink_to(tmp_path / "secret")
    for name in (".env", ".hidden.png", "checkpoints/.cache", "checkpoints/step-00000001/.env"):
        (tmp_path / "run" / name).write_text("token")
    (checkpoint / "notes.txt").write_text("mine")
    export(tmp_path / "run", tmp_path / "out", training_state=True, with_code=True)
    files = files_below(tmp_path / "out")
    assert {name for name in files if "checkpoints" in name} == {
        f"checkpoints/step-00000001/{name}" for name in ("optimizer.safetensors", MANIFEST)
    }
    assert "training.png" in files
    assert not {"leak.png", "LICENSE", "notes.txt", ".env", ".hidden.png"} & files


def test_the_newest_whole_checkpoint_is_shared_and_not_a_damaged_newer_one(processor, tmp_path, caplog):
    save(TCLForPreTraining, tmp_path / "run", processor)
    newer = tmp_path / "run/checkpoints/step-00000002"
    save_state(newer)
    (newer / "optimizer.safetensors").write_bytes(b"cut")
    link = tmp_path / "run/checkpoints/step-00000003"
    save_state(link)
    (link / "optimizer.safetensors").rename(tmp_path / "moved")
    (link / "optimizer.safetensors").symlink_to(tmp_path / "moved")
    export(tmp_path / "run", tmp_path / "out", training_state=True)
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"step-00000001"}
    assert "step-00000002 is passed over: its file optimizer.safetensors is not what was saved" in caplog.text
    assert "step-00000003 is passed over: its file optimizer.safetensors is a link out of it" in caplog.text


def test_adapters_that_are_links_out_of_their_folder_are_not_shared(adapted, tmp_path):
    _, folder, _ = adapted
    (folder / ADAPTER_CONFIG).rename(tmp_path / "secret")
    (folder / ADAPTER_CONFIG).symlink_to(tmp_path / "secret")
    with pytest.raises(HubError, match=r"adapter_config\.json cannot be shared: it is missing, or a link to a file"):
        export(folder, tmp_path / "out", base_model="user/base")


def test_a_push_in_the_background_sends_the_files_of_the_manifest_alone(hub, repo, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoints/step-00000001"
    save_state(checkpoint)
    for name in (".env", "notes.txt"):
        (checkpoint / name).write_text("token")
    push = BackgroundPush(repo)
    push.start(checkpoint)
    push.finish()
    sent = {name for name in hub.repos[repo].find("main").files if name.startswith("checkpoints/")}
    assert sent == {f"checkpoints/step-00000001/{name}" for name in ("optimizer.safetensors", MANIFEST)}
    (checkpoint / "optimizer.safetensors").write_bytes(b"cut")
    push.start(checkpoint)
    push.finish()
    assert f"{checkpoint} was not pushed: it is damaged: its file optimizer.safetensors" in caplog.text


def test_a_file_damaged_on_the_way_is_refused(hub, repo, processor, tmp_path):
    save(TCLModel, tmp_path / "run", processor)
    push(tmp_path / "run", repo)
    stored, name = hub.repos[repo].objects, checksum(tmp_path / "run/model.safetensors")
    stored[name] = stored[name][:-1] + bytes([stored[name][-1] ^ 1])
    with pytest.raises(HubError, match="its checksum differs from SHA256SUMS"):
        pull(repo, tmp_path / "out")


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["tcl_hf"] = None  # cannot be imported
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoProcessor
repo, kind, out = sys.argv[1:]
opened = {"AutoModel": AutoModel, "AutoModelForPreTraining": AutoModelForPreTraining,
          "AutoModelForSequenceClassification": AutoModelForSequenceClassification}[kind]
model = opened.from_pretrained(repo, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
from PIL import Image
import numpy as np
pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
inputs = processor(images=[Image.fromarray(pixels)] * 2, text=["a red dog!", "the house"], return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
torch.save({"class": type(model).__name__, "inputs": dict(inputs),
            "output": output[0] if kind == "AutoModelForSequenceClassification" else output.logits_per_image}, out)
"""


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (TCLForPreTraining, "AutoModel"),
        (TCLForPreTraining, "AutoModelForPreTraining"),
        (TCLForVisualEntailment, "AutoModelForSequenceClassification"),
    ],
)
def test_a_repository_with_code_opens_where_the_package_is_not_installed(
    hub, repo, processor, model_class, auto_class, tmp_path
):
    model = save(model_class, tmp_path / "run", processor)
    push(tmp_path / "run", repo, with_code=True)
    assert {path.name for path in CODE} <= hub.repos[repo].find("main").files.keys()
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub.token,
        "PYTHONPATH": "",
    }
    result = tmp_path / "result.pt"
    subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, repo, auto_class, str(result)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    found = torch.load(result)
    assert found["class"] == ("TCLModel" if auto_class == "AutoModel" else model_class.__name__)
    inputs = found["inputs"]
    with torch.no_grad():
        expected = model(**inputs)[0] if model_class is TCLForVisualEntailment else model.tcl(**inputs).logits_per_image
    assert torch.equal(found["output"], expected)
    texts = processor(text=["a red dog!", "the house"], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], texts["input_ids"])


def test_checkpoints_are_pushed_in_the_background_and_another_machine_continues(hub, repo, tmp_path):
    tiny_run(tmp_path / "reference")
    tiny_run(tmp_path / "run", save_steps=2, push_to_hub=True, hub_model_id=repo)
    files = hub.repos[repo].find("main").files
    assert hub.repos[repo].private
    steps = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    # The second checkpoint stays where its push was still running when the last one was written.
    assert steps in ({newest_checkpoint(tmp_path / "run").name}, {"step-00000002"})
    pull(repo, tmp_path / "other")
    torch.manual_seed(9)
    tiny_run(tmp_path / "other", model=TCLForPreTraining(small_patches()), resume=True)
    after = int(steps.pop().removeprefix("step-"))
    assert losses(tmp_path / "other") == losses(tmp_path / "reference")[after:]


def test_a_push_that_fails_does_not_stop_the_run(hub, tmp_path, caplog):
    tiny_run(tmp_path, save_steps=4, push_to_hub=True, hub_model_id="other/name")
    assert "was not pushed: The Hub refuses the token for other/name" in caplog.text
    assert len(losses(tmp_path)) == 6
