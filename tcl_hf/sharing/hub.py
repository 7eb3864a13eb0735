"""Checkpoints on the Hub: what of a run's folder is shared, how it is pushed, and how a run goes on from there."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import models
from ..models.checksums import verify_checksums
from ..models.processing_tcl import TCLProcessor
from ..training.checkpoints import CHECKPOINTS, newest_checkpoint
from .cards import CARD, EXAMPLE, plain_card
from .convert import CheckpointError, open_saved

logger = logging.getLogger(__name__)

# What lies beside the weights and is worth sharing; nothing else of a folder leaves it.
SHARED_FILES = (CARD, "LICENSE", "*.png", "answers.json", "evaluation.json", "metrics.jsonl")

# The code that models and processor need where the package is not installed: all of `models/`.
CODE = sorted(path for path in Path(models.__file__).parent.glob("*.py") if path.stem != "__init__")
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
# transformers has no Auto class for these; a repository of one of them opens it so.
_CLASSIFIERS = ("TCLForVisualEntailment", "TCLForVisualReasoning", "TCLForTextAssignment")


class HubError(ValueError):
    """A push or pull that did not happen; the message says what, where, and the remedy."""


def export(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    *,
    training_state: bool = False,
    with_code: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Lay out in `target` what of a model's or run's folder is shared. The same folder gives the same bytes.

    Args:
        training_state: teacher, queues and the newest checkpoint too, so that the run can go on; else the weights
            that inference needs, whose config says that there is no teacher.
        with_code: the code too, so that it opens with `trust_remote_code=True` where `tcl_hf` is not installed.
        max_shard_size: of a file of weights.

    Raises:
        HubError: if the folder holds no model of ours.
    """
    folder, target = Path(folder), Path(target)
    try:
        model = open_saved(folder, **({} if training_state else {"use_momentum_teacher": False}))
        processor = TCLProcessor.from_pretrained(folder)
    except (CheckpointError, OSError, ValueError) as error:
        raise HubError(f"{folder} can not be shared: {error}") from error
    model.save_pretrained(target, max_shard_size=max_shard_size)
    processor.save_pretrained(target)
    for pattern in SHARED_FILES:
        for path in sorted(folder.glob(pattern)):
            _copy(path, target / path.name, folder)
    if not (target / CARD).exists():
        plain_card(folder.resolve().name, type(model).__name__, model.config.trained_on).write(target)
    checkpoint = newest_checkpoint(folder) if training_state else None
    for path in sorted(checkpoint.rglob("*")) if checkpoint else ():
        if path.is_file():
            _copy(path, target / path.relative_to(folder), folder)
    if with_code:
        _add_code(target, type(model).__name__)


def _copy(path: Path, target: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        logger.warning("Not shared: %s is a link to a file outside of %s.", path, folder)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _add_code(target: Path, class_name: str) -> None:
    """Add the modules, and say in every config what opens from them."""
    for path in CODE:
        shutil.copyfile(path, target / path.name)
    auto_map = dict(AUTO_MAP)
    if class_name in _CLASSIFIERS:
        auto_map["AutoModelForSequenceClassification"] = f"modeling_tcl_tasks.{class_name}"
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
    token: str | None = None,
) -> CommitInfo:
    """Push a model's or run's folder to the Hub in one commit: see `export` for what is pushed.

    Files that are there already are not sent again: the same folder makes no new commit, and after an interruption
    only what is missing is sent.

    Args:
        repo_id: `user/name`; made if it is not there.
        private: whether a new repository is private; the account's default if None.
        revision: branch to push to, made if it is not there; `main` if None.
        create_pr: propose it as a pull request.
        token: of the account; that of `hf auth login` if None.

    Raises:
        HubError: if the folder can not be shared, or the Hub refuses or can not be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as unpacked:
        export(folder, unpacked, training_state=training_state, with_code=with_code, max_shard_size=max_shard_size)
        card = Path(unpacked) / CARD  # a widget finds its picture by address only
        address = f"{api.endpoint}/{repo_id}/resolve/main/{EXAMPLE}"
        card.write_text(
            card.read_text(encoding="utf-8").replace(f"src: {EXAMPLE}\n", f"src: {address}\n"), encoding="utf-8"
        )
        with _one_sentence(repo_id, revision):
            if not create_pr:  # whoever proposes may not make repositories
                api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=unpacked,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Push {Path(folder).resolve().name}",
                delete_patterns=["model*.safetensors", "model.safetensors.index.json"],  # shards of a former push
            )


def pull(repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a repository into a folder; where it was pushed with its training state, `--resume` goes on from it.

    An interrupted download resumes; every file appears when it is whole, and weights are compared with their checksums.

    Raises:
        HubError: if the repository or revision is not there, is not yours to read, or can not be reached; or if a file
            is damaged.
    """
    with _one_sentence(repo_id, revision):
        snapshot_download(repo_id, revision=revision, local_dir=str(folder), token=token)
    try:
        verify_checksums(folder)
    except OSError as error:
        raise HubError(f"{repo_id} was pulled, but {error}") from error
    return Path(folder)


class BackgroundPush:
    """Pushes a run's newest checkpoint while training goes on; one at a time, in place of those pushed before.

    `pull` into a folder and `--resume` go on from it. A push that fails is told and does not stop the run.

    Args:
        repo_id: `user/name`; made, private, if it is not there.
    """

    def __init__(self, repo_id: str):
        self.repo_id, self.api = repo_id, HfApi()
        self.future: Future[CommitInfo] | None = None
        self.checkpoint: Path | None = None

    @property
    def on_its_way(self) -> Path | None:
        """The checkpoint that is being pushed, and may not be removed."""
        return self.checkpoint if self.future is not None and not self.future.done() else None

    def start(self, checkpoint: Path) -> None:
        """Begin to push a checkpoint, unless the one before is still on its way."""
        if self.on_its_way:
            logger.warning("%s is not pushed: %s is still on its way.", checkpoint, self.checkpoint)
            return
        self.finish()
        self.checkpoint = checkpoint
        self.future = self.api.run_as_future(self._push, checkpoint)

    def _push(self, checkpoint: Path) -> CommitInfo:
        with _one_sentence(self.repo_id, None):
            self.api.create_repo(self.repo_id, private=True, exist_ok=True)
            return self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=checkpoint.parent,
                path_in_repo=CHECKPOINTS,
                allow_patterns=f"{checkpoint.name}/*",
                delete_patterns="step-*",
                commit_message=f"Checkpoint {checkpoint.name}",
            )

    def finish(self) -> None:
        """Wait for what is on its way, and tell if it failed."""
        if self.future is not None:
            try:
                self.future.result()
            except HubError as error:
                logger.warning("%s was not pushed: %s", self.checkpoint, error)
        self.future = self.checkpoint = None


@contextmanager
def _one_sentence(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the client raises into a sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: ask for access on its page, and pass the token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repository {repo_id}, or it is private and not yours to see: check the name, and pass the "
            "token of an account that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id} has no revision '{revision}': choose one of its branches, tags or commits."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx2.TransportError) as error:
        raise HubError(f"The Hub can not be reached for {repo_id}: connect, or unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except RuntimeError as error:  # an upload that failed, with the answer as its cause
        cause = error.__cause__
        reason = _refusal(repo_id, cause) if isinstance(cause, HfHubHTTPError) else f"{repo_id}: {cause or error}"
        raise HubError(f"{reason} What was sent so far stays: push again to go on.") from error
    except OSError as error:
        raise HubError(f"{repo_id} could not be read or written here: {error}.") from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return f"The Hub refuses the token for {repo_id} ({status}): pass one that may write there (hf auth login)."
    return f"The Hub refused {repo_id} ({status}): {(error.server_message or str(error)).strip().splitlines()[0]}"
