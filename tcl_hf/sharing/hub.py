"""Models and runs on the Hub: which files of a folder are shared, how they are pushed, and how they are pulled."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import models
from ..models.checksums import verify_checksums, write_checksums
from ..models.encoders import TCLPreTrainedModel
from ..models.processing_tcl import TCLProcessor
from ..models.whole_files import replace_file
from ..training.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, config_of
from ..training.checkpoints import CHECKPOINTS, files_of, newest_whole_checkpoint, what_is_damaged
from .cards import CARD, EXAMPLE, mark_as_adapter, plain_card
from .convert import class_of, open_saved
from .original_files import CheckpointError

try:  # the client of huggingface_hub, which comes with it
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError  # type: ignore[assignment, no-redef, import-not-found]

logger = logging.getLogger(__name__)

# The files beside the weights that are shared; nothing else of a folder leaves it.
SHARED_FILES = (CARD, "LICENSE", "*.png", "answers.json", "task.json", "evaluation.json", "metrics.jsonl")

# Shards, and files of a whole model or of adapters, where an earlier push of a repository sent the other.
_OF_EARLIER_PUSHES = ["model*.safetensors", "model.safetensors.index.json", "config.json"]
_OF_EARLIER_PUSHES += [ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG]

# The code that models and processors need where the package is not installed: all of `models/`.
CODE = sorted(path for path in Path(models.__file__).parent.glob("*.py") if path.stem != "__init__")
HANDLER = Path(__file__).with_name("handler.py")  # with that code, for Inference Endpoints
# The Auto classes that open a repository with that code. Of the heads that share `AutoModelForSequenceClassification`,
# each repository names its own, see `TCLPreTrainedModel.auto_model`.
AUTO_MAP: dict[str, Any] = {
    "AutoConfig": "configuration_tcl.TCLConfig",
    "AutoModel": "modeling_tcl.TCLModel",
    "AutoModelForPreTraining": "modeling_tcl.TCLForPreTraining",
    "AutoModelForMaskedLM": "modeling_tcl.TCLForMaskedLM",
    "AutoModelForVisualQuestionAnswering": "modeling_tcl_tasks.TCLForQuestionAnswering",
    "AutoModelForZeroShotImageClassification": "modeling_tcl.TCLModel",
    "AutoProcessor": "processing_tcl.TCLProcessor",
    "AutoImageProcessor": {
        "torchvision": "image_processing_tcl.TCLImageProcessor",
        "pil": "image_processing_tcl.TCLImageProcessorPil",
    },
    "AutoTokenizer": ["tokenization_tcl.TCLTokenizer", None],
}


class HubError(ValueError):
    """A push or pull that failed; the message names the problem, its place and the remedy."""


def export(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    *,
    training_state: bool = False,
    with_code: bool = False,
    max_shard_size: str = "5GB",
    base_model: str | None = None,
) -> None:
    """Copy the files of a model's or run's folder that are shared to `target`. The same folder gives the same bytes.

    A folder of LoRA adapters is copied as it is: to open it takes the model that the adapters belong to.

    Args:
        training_state: include teacher, queues and the newest checkpoint, so that the run can be continued. Without it,
            only the weights for inference are copied, and their config has `use_momentum_teacher=False`.
        with_code: include the code, so that the model opens with `trust_remote_code=True` where `tcl_hf` is not
            installed, and the handler of Inference Endpoints.
        max_shard_size: limit of the size of a file of weights.
        base_model: for adapters, the name on the Hub of the model that they belong to; the one that they were trained
            on if None.

    Raises:
        HubError: if the folder does not hold a model of ours, or adapters belong to a model in a folder.
    """
    folder, target = Path(folder), Path(target)
    base = _base_on_hub(folder, base_model, with_code)
    try:
        if base is not None:
            config = config_of(str(folder))
            model_class = class_of(config)
        else:
            model = open_saved(folder, **({} if training_state else {"use_momentum_teacher": False}))
            model_class, config = type(model), model.config
        processor = TCLProcessor.from_pretrained(folder)
    except (CheckpointError, OSError, ValueError) as error:
        raise HubError(f"{folder} cannot be shared: {error}") from error
    if base is not None:
        _copy_adapters(folder, target, base)
    else:
        model.save_pretrained(target, max_shard_size=max_shard_size)
    processor.save_pretrained(target)
    shared = [path for pattern in SHARED_FILES for path in sorted(folder.glob(pattern))]
    checkpoint = newest_whole_checkpoint(folder) if training_state else None
    if checkpoint:
        shared += [checkpoint / name for name in files_of(checkpoint)]
    for path in shared:
        copy = target / path.relative_to(folder)
        if path.name.startswith(".") or not path.is_file():
            continue
        if _is_inside(path, folder):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        else:
            logger.warning("%s is not shared, because it is a link to a file outside of %s.", path, folder)
    if not (target / CARD).exists():
        name = folder.resolve().name
        plain_card(name, model_class, config.trained_on, adapter_of=base).write(target)
    elif base is not None:
        card = ModelCard.load(target / CARD)
        mark_as_adapter(card, base)
        replace_file(target / CARD, str(card))
    if with_code:
        _add_code(target, model_class)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder, and not a link to one outside of it."""
    return path.resolve().is_relative_to(folder.resolve())


def _base_on_hub(folder: Path, base_model: str | None, with_code: bool) -> str | None:
    """The name on the Hub of the model that a folder's adapters belong to; None for a whole model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        if base_model is not None:
            raise HubError(f"{folder} holds a whole model, which needs no base_model: leave it out.")
        return None
    if with_code:
        raise HubError(f"{folder} holds adapters, which open with the code of their base model: leave out with_code.")
    try:
        base = base_model or json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise HubError(
            f"{folder / ADAPTER_CONFIG} cannot be read ({error}): write it anew, or name base_model."
        ) from error
    if not base or Path(base).exists():
        raise HubError(
            f"{folder} holds adapters of {base}, a folder of this machine: push that model first, and name its "
            "repository as base_model."
        )
    return base


def _copy_adapters(folder: Path, target: Path, base: str) -> None:
    """Copy adapters, whose config then names this base model."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, MODEL_CONFIG):
        if not (folder / name).is_file() or not _is_inside(folder / name, folder):
            raise HubError(f"{folder / name} cannot be shared: it is missing, or a link to a file outside of {folder}.")
        shutil.copyfile(folder / name, target / name)
    _edit(target / ADAPTER_CONFIG, {"base_model_name_or_path": base})
    write_checksums(target)


def _add_code(target: Path, model_class: type[TCLPreTrainedModel]) -> None:
    """Add the modules, and in every config the Auto classes that open from them."""
    for path in (*CODE, HANDLER):
        shutil.copyfile(path, target / path.name)
    auto_map = dict(AUTO_MAP)
    if model_class.auto_model is not None:
        auto_map[model_class.auto_model] = f"{model_class.__module__.rsplit('.', 1)[-1]}.{model_class.__name__}"
    _edit(target / "config.json", {"auto_map": auto_map})
    _edit(target / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]}})
    processor = json.loads((target / "processor_config.json").read_text())
    images = processor["image_processor"] | {"auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}}
    changes = {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}, "image_processor": images}
    _edit(target / "processor_config.json", changes)


def _edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2, sort_keys=True) + "\n")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    training_state: bool = False,
    with_code: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    max_shard_size: str = "5GB",
    base_model: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push the files of a model's or run's folder that `export` copies to the Hub, in one commit.

    Files that the repository has already are not sent again: pushing the same folder twice makes no second commit, and
    after an interruption only the missing files are sent.

    Args:
        repo_id: `user/name`; created if it does not exist.
        training_state, with_code, max_shard_size, base_model: see `export`.
        private: whether a new repository is private; the account's default if None.
        revision: branch to push to, created if it does not exist; `main` if None.
        create_pr: open a pull request instead of pushing to a branch.
        commit_message: title of the commit; made from the folder's name if None.
        token: token of the account; the one saved by `hf auth login` if None.

    Raises:
        HubError: if the folder cannot be shared, or if the Hub refuses it or cannot be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as unpacked:
        contents: Any = {"training_state": training_state, "with_code": with_code, "max_shard_size": max_shard_size}
        export(folder, unpacked, **contents, base_model=base_model)
        card = Path(unpacked) / CARD  # the widget needs its picture's address on the Hub, and the code the model's name
        address = f"{api.endpoint}/{repo_id}/resolve/main/{EXAMPLE}"
        text = card.read_text(encoding="utf-8").replace(f"src: {EXAMPLE}\n", f"src: {address}\n")
        text = re.sub(r'\b(from_pretrained|config_of|open_checkpoint)\("[^"\n]*"', rf'\1("{repo_id}"', text)
        card.write_text(text, encoding="utf-8")
        with _hub_errors(repo_id, revision):
            if not create_pr:  # a pull request may come from an account that cannot create this repository
                api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=unpacked,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Push {Path(folder).resolve().name}",
                delete_patterns=_OF_EARLIER_PUSHES,
            )


def push_space(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> CommitInfo:
    """Push a folder as a Gradio Space, in one commit. Files of an earlier push that are not in it are removed.

    Args:
        repo_id: `user/name`; created if it does not exist.
        private: whether a new Space is private; the account's default if None.
        token: as for `push`.

    Raises:
        HubError: if the Hub refuses it or cannot be reached.
    """
    api = HfApi(token=token)
    with _hub_errors(repo_id, None):
        api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        message = "Push the app"
        options: dict[str, Any] = {"repo_type": "space", "commit_message": message, "delete_patterns": "*"}
        return api.upload_folder(repo_id=repo_id, folder_path=str(folder), **options)


def pull(repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a repository into a folder. If it was pushed with its training state, `--resume` continues the run.

    An interrupted download resumes. Every file appears only when it is whole, and weights are compared with their
    checksums.

    Args:
        repo_id: name of the repository, such as "user/name".
        folder: where its files go.
        revision: branch, tag or commit; the main branch if None.
        token: the token to read with; that of the login if None.

    Raises:
        HubError: if the repository or revision does not exist, cannot be read with this token or cannot be reached, or
            if a file is damaged.
    """
    with _hub_errors(repo_id, revision):
        snapshot_download(repo_id, revision=revision, local_dir=str(folder), token=token)
    try:
        verify_checksums(folder)
    except OSError as error:
        raise HubError(f"{repo_id} was pulled, but {error}") from error
    return Path(folder)


class BackgroundPush:
    """Pushes a run's newest checkpoint while training goes on. Each checkpoint replaces the one before it.

    `pull` into a folder and `--resume` continue the run from it. If a push fails, a warning is logged and the run goes
    on.

    Args:
        repo_id: `user/name`; created as a private repository if it does not exist.
    """

    def __init__(self, repo_id: str):
        self.repo_id, self.api = repo_id, HfApi()
        self.future: Future[CommitInfo] | None = None
        self.checkpoint: Path | None = None

    @property
    def on_its_way(self) -> Path | None:
        """The checkpoint that is being pushed and must not be removed; None if there is none."""
        return self.checkpoint if self.future is not None and not self.future.done() else None

    def start(self, checkpoint: Path) -> None:
        """Begin to push a checkpoint, unless the previous one is still being pushed."""
        if self.on_its_way:
            logger.warning("%s is not pushed, because %s is still being pushed.", checkpoint, self.checkpoint)
            return
        self.finish()
        self.checkpoint = checkpoint
        self.future = self.api.run_as_future(self._push, checkpoint)

    def _push(self, checkpoint: Path) -> CommitInfo:
        damage = what_is_damaged(checkpoint)  # here, because it takes time, and training goes on meanwhile
        if damage is not None:
            raise HubError(f"it is damaged: {damage}")
        with _hub_errors(self.repo_id, None):
            self.api.create_repo(self.repo_id, private=True, exist_ok=True)
            return self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=checkpoint.parent,
                path_in_repo=CHECKPOINTS,
                allow_patterns=[f"{checkpoint.name}/{name}" for name in files_of(checkpoint)],
                delete_patterns="step-*",
                commit_message=f"Checkpoint {checkpoint.name}",
            )

    def finish(self) -> None:
        """Wait until the current push has ended, and log a warning if it failed."""
        if self.future is not None:
            try:
                self.future.result()
            except HubError as error:
                logger.warning("%s was not pushed: %s", self.checkpoint, error)
        self.future = self.checkpoint = None


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the exceptions of the Hub's client into a `HubError` of one sentence."""
    try:
        yield
    except (HfHubHTTPError, TransportError, OSError, RuntimeError) as error:
        raise HubError(_reason(error, repo_id, revision)) from error


def _reason(error: Exception, repo_id: str, revision: str | None) -> str:
    """Return a sentence about an exception of the Hub's client, with the remedy."""
    match error:
        case GatedRepoError():
            return f"{repo_id} is gated: ask for access on its page, and pass the token of the account that has it."
        case RepositoryNotFoundError():
            return (
                f"There is no repository {repo_id}, or it is private and this token cannot read it: check the name, "
                "and pass the token of an account that can."
            )
        case RevisionNotFoundError():
            return f"{repo_id} has no revision '{revision}': choose one of its branches, tags or commits."
        case OfflineModeIsEnabled() | LocalEntryNotFoundError() | TransportError():
            return f"The Hub cannot be reached for {repo_id}: check the connection, or unset HF_HUB_OFFLINE."
        case HfHubHTTPError():
            return _refusal(repo_id, error)
        case OSError():
            return f"Files of {repo_id} could not be read or written on this machine: {error}."
    cause = error.__cause__  # An upload failed with a `RuntimeError`, and the Hub's answer is its cause.
    reason = _refusal(repo_id, cause) if isinstance(cause, HfHubHTTPError) else f"{repo_id}: {cause or error}"
    return f"{reason} Files that were sent stay there: push again to send the rest."


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    """Return a sentence about an answer of the Hub other than success."""
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return f"The Hub refuses the token for {repo_id} ({status}): pass one that may write (hf auth login)."
    return f"The Hub refused {repo_id} ({status}): {(error.server_message or str(error)).strip().splitlines()[0]}"
