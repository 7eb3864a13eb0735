"""States of a locked vision encoder, kept on disk: computed once for some views of each image, and read in place of it.

A folder of kept states holds shards in the format of safetensors, which are mapped into memory, and `manifest.json`,
which says what the states are of: the locked weights, the views and the images. States of anything else are not used.
Every shard is written under another name and renamed when it is complete, so that an interrupted run goes on with the
next one, and several runs and processes read the same files.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..models.encoders import TCLVisionModel
from ..models.processing_tcl import TCLProcessor
from ..models.whole_files import replace_file
from .augmentation import TCLAugmentation
from .images import IMAGE_ERRORS, identity_of, open_image
from .records import DataError
from .sampling import mix_seeds
from .workers import Workers

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20  # so that an interrupted run loses little, and a large data set has few files
DTYPE = torch.float16
BYTES_LEFT = 2**28  # free space that is left on the disk for the run itself

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StatesPlan:
    """The size of kept states, and a fingerprint of everything that they depend on.

    Args:
        fingerprint: a hash of the locked weights, the views, and the images.
        num_images: number of different images.
        num_views: augmented views of each image. The image as it is evaluated is kept too, before them.
        num_states: states of a view: class token, patches, and register tokens if the upper layers read them.
        width: numbers in a state.
    """

    fingerprint: str
    num_images: int
    num_views: int
    num_states: int
    width: int

    @property
    def bytes_per_image(self) -> int:
        """Bytes of all views of an image."""
        return (1 + self.num_views) * self.num_states * self.width * DTYPE.itemsize

    @property
    def images_per_shard(self) -> int:
        """Images whose states are in one file."""
        return max(1, SHARD_BYTES // self.bytes_per_image)

    @property
    def num_shards(self) -> int:
        """Number of files."""
        return -(-self.num_images // self.images_per_shard)

    def images_of(self, shard: int) -> range:
        """The images in a shard, by number."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return self.num_images * self.bytes_per_image


class KeptStates:
    """Reads kept states; rows are those of the data set that they were made of.

    Args:
        folder: the folder of one fingerprint.
        plan: what it has to hold.
        image_of_row: the image of each row of the data set; rows may share one.
        plain_view: whether the image as it is evaluated is among the views to train on.

    Raises:
        DataError: if a shard is missing or damaged.
    """

    def __init__(self, folder: Path, plan: StatesPlan, image_of_row: list[int], plain_view: bool = False):
        self.folder, self.plan, self.image_of_row, self.plain_view = folder, plan, image_of_row, plain_view
        self._shards: dict[int, tuple[Tensor, Tensor]] = {}
        missing = [shard for shard in range(plan.num_shards) if not _is_whole(_shard_file(folder, shard), plan, shard)]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {plan.num_shards} shards of kept states, the first of them "
                f"{_shard_file(folder, missing[0]).name}: run the same command again, which makes them."
            )

    def __len__(self) -> int:
        return len(self.image_of_row)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # A worker process maps the files itself.

    @property
    def training_views(self) -> Sequence[int]:
        """The numbers of the views to train on; without augmented views, that of the image itself."""
        return range(0 if self.plain_view else 1, 1 + self.plan.num_views) or [0]

    def views(self, row: int, numbers: Sequence[int]) -> list[Tensor]:
        """States (1 + P, width) of some views of a row's image; view 0 is the image as it is evaluated.

        Raises:
            ValueError: if the image could not be read when the states were made.
        """
        image = self.image_of_row[row]
        shard = image // self.plan.images_per_shard
        if shard not in self._shards:
            with safe_open(_shard_file(self.folder, shard), framework="pt") as file:
                self._shards[shard] = file.get_tensor("states"), file.get_tensor("readable")
        states, readable = self._shards[shard]
        place = image - shard * self.plan.images_per_shard
        if not readable[place]:
            raise ValueError("the image could not be read when its states were made")
        return [states[place, number] for number in numbers]


class SamplesWithStates:
    """The records of a map-style data set, each with the kept states of its image as `states`.

    Args:
        dataset: the records.
        kept: the states of their images.
    """

    def __init__(self, dataset: Any, kept: KeptStates):
        self.dataset, self.kept = dataset, kept

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"There is no record {row} among {len(self)}.")
        return {**self.dataset[row], "states": StatesOfRow(self.kept, row)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> "SamplesWithStates":
        """Some of the records, with the states of their images."""
        images = [self.kept.image_of_row[row] for row in rows]
        kept = KeptStates(self.kept.folder, self.kept.plan, images, self.kept.plain_view)
        return SamplesWithStates(self.dataset.select(rows), kept)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "kept"):  # They are not there yet while a copy is unpickled.
            raise AttributeError(name)
        return getattr(self.dataset, name)


@dataclass(frozen=True)
class StatesOfRow:
    """The kept states of one record's image."""

    kept: KeptStates
    row: int

    def plain(self) -> Tensor:
        """States (1 + P, width) of the image as it is evaluated."""
        return self.kept.views(self.row, [0])[0]

    def all_to_train_on(self) -> list[Tensor]:
        """States (1 + P, width) of all views to train on, see `KeptStates.training_views`."""
        return self.kept.views(self.row, self.kept.training_views)

    def draw(self, number: int) -> list[Tensor]:
        """States (1 + P, width) of `number` different views to train on, drawn by PyTorch's generator.

        There are fewer different ones if fewer are kept.
        """
        available = self.kept.training_views
        if not self.kept.plan.num_views:
            return self.kept.views(self.row, available) * number
        drawn = torch.randperm(len(available))[:number].tolist()
        return self.kept.views(self.row, [available[drawn[place % len(drawn)]] for place in range(number)])


def plain_view_of(processor: TCLProcessor, record: dict[str, Any]) -> Tensor:
    """A record's image as it is evaluated: its pixels (3, H, W), or the states that are kept of it (1 + P, width).

    In float32, because autocast on CPUs cannot stack half precision.

    Raises:
        one of IMAGE_ERRORS: if the image cannot be read.
    """
    if "states" in record:
        return record["states"].plain().float()
    with open_image(record.get("image")) as image:
        return processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


@dataclass
class _ViewsOfImages(torch.utils.data.Dataset):
    """The pixels (1 + views, 3, H, W) of images by number, or None for one that cannot be read.

    The random choices of a view follow from the numbers of image and view, so that it does not matter when it is made.
    """

    dataset: Any
    first_rows: list[int]
    processor: TCLProcessor
    augmentation: TCLAugmentation | None
    num_views: int

    def __len__(self) -> int:
        return len(self.first_rows)

    def __getitem__(self, image: int) -> Tensor | None:
        record = self.dataset[self.first_rows[image]]
        try:
            with torch.random.fork_rng(devices=[]):
                views = [plain_view_of(self.processor, record)]
                for view in range(self.num_views):
                    assert self.augmentation is not None
                    torch.default_generator.manual_seed(mix_seeds(view, image))
                    with open_image(record["image"]) as again:
                        views += self.augmentation(again, 1)
                return torch.stack(views)
        except IMAGE_ERRORS as error:
            logger.warning("The image of %s cannot be read: %s", record.get("image_id"), error)
            return None


def keep_states(
    dataset: Any,
    vision_model: TCLVisionModel,
    encode: Encode,
    processor: TCLProcessor,
    augmentation: TCLAugmentation | None,
    num_views: int,
    folder: str | os.PathLike,
    *,
    plain_view: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> SamplesWithStates:
    """Compute the states of a locked vision encoder that are not on disk yet, and return the records with them.

    Args:
        dataset: map-style records with an `image` each. Rows with the same image share its states.
        vision_model: the encoder, some or all of whose layers are locked.
        encode: computes states (N, 1 + P, width) of images (N, 3, H, W): `vision_model.encode_locked`, perhaps in
            another precision or on another device.
        processor: makes the pixels of the image as it is evaluated.
        augmentation: makes the augmented views; None if `num_views` is 0.
        num_views: augmented views of each image to keep beside the image itself.
        folder: folder of all kept states; those of one fingerprint have a folder of their own in it.
        plain_view: as in `KeptStates`.
        batch_size: views in a forward pass.
        num_workers: processes that decode and augment images.
        rank, world_size: this process and the number of processes, which share the work.
        wait: waits for the other processes.

    Raises:
        DataError: if the records have no single image each, the disk has too little space, or a file cannot be written.
    """
    identities = _images_of(dataset)
    number_of: dict[str, int] = {}
    first_rows: list[int] = []
    image_of_row = []
    for row, identity in enumerate(identities):
        if identity not in number_of:
            number_of[identity] = len(first_rows)
            first_rows.append(row)
        image_of_row.append(number_of[identity])
    plan = _plan(vision_model, processor, augmentation, num_views, list(number_of))
    place = Path(folder) / plan.fingerprint
    images = _ViewsOfImages(dataset, first_rows, processor, augmentation, num_views)
    mine = range(rank, plan.num_shards, world_size)
    missing = [shard for shard in mine if not _is_whole(_shard_file(place, shard), plan, shard)]
    _check_space(place, plan, sum(len(plan.images_of(shard)) for shard in missing) * world_size)
    wait()  # before any process fills the disk
    if missing:
        _make_shards(place, plan, images, missing, encode, batch_size, num_workers, rank == 0)
    wait()
    return SamplesWithStates(dataset, KeptStates(place, plan, image_of_row, plain_view))


def _images_of(dataset: Any) -> list[str]:
    """A hash for each row's image: of its bytes, or of its path with the file's size and time of change."""
    columns = getattr(dataset, "column_names", None) or []
    if "image" not in columns:
        raise DataError(
            "States are kept of map-style records with one image each, and these have the columns "
            f"{', '.join(columns) or 'of a stream'}: leave kept_views out."
        )
    return [identity_of(row["image"]) for row in tqdm(dataset.select_columns(["image"]), "Hashing images", leave=False)]


def _plan(
    vision_model: TCLVisionModel,
    processor: TCLProcessor,
    augmentation: TCLAugmentation | None,
    num_views: int,
    identities: list[str],
) -> StatesPlan:
    """The plan for these images, with the fingerprint of weights, views and images."""
    config = vision_model.config
    if config.lock is False:
        raise DataError(
            f"kept_views={num_views} keeps the states of locked layers, but no layer of the vision encoder is locked: "
            "set lock_vision in the config, or leave out kept_views and plain_view."
        )
    pixels = processor.image_processor
    # As plain numbers, because a processor that was saved and reopened has other types.
    views = {
        "size": [int(pixels.size["height"]), int(pixels.size["width"])],
        "normalisation": [float(value) for value in (*pixels.image_mean, *pixels.image_std)],
        "resample": int(pixels.resample),
        "views": num_views,
        "augmentation": augmentation.settings() if augmentation is not None and num_views else None,
    }
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(views, sort_keys=True).encode())
    of_config = [config.lock, config.layer_norm_eps, config.hidden_act, config.num_attention_heads]
    if config.lock is True and config.output_grid is not None:  # Else the states are those of all patches.
        of_config.append(config.output_grid)
    digest.update(json.dumps(of_config).encode())
    for name, part in vision_model.locked_parts().items():
        for key, weight in sorted(part.state_dict().items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    for identity in identities:
        digest.update(identity.encode())
    return StatesPlan(digest.hexdigest(), len(identities), num_views, *vision_model.locked_shape)


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"states-{shard:05d}.safetensors"


def _is_whole(file: Path, plan: StatesPlan, shard: int) -> bool:
    """Whether a shard is there and has all its states. (safetensors refuses a file that is shorter than its header.)"""
    expected = [len(plan.images_of(shard)), 1 + plan.num_views, plan.num_states, plan.width]
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice("states").get_shape() == expected
    except (OSError, SafetensorError):
        if file.exists():
            logger.warning("%s is damaged, and its states are made again.", file)
        return False


def _check_space(place: Path, plan: StatesPlan, num_images: int) -> None:
    """Refuse to begin if the states of so many images do not fit on the disk."""
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    needed, free = num_images * plan.bytes_per_image, shutil.disk_usage(existing).free
    if num_images and needed + BYTES_LEFT > free:
        raise DataError(
            f"{place} needs {needed / 1e9:.2f} GB for the states of {num_images} images with {plan.num_views} views, "
            f"and {BYTES_LEFT / 1e9:.2f} GB for the run, but {free / 1e9:.2f} GB are free: free some, choose fewer "
            "kept_views, or another kept_states_dir."
        )


def _make_shards(
    place: Path,
    plan: StatesPlan,
    images: _ViewsOfImages,
    shards: list[int],
    encode: Encode,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> None:
    """Compute and write some shards."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / MANIFEST, json.dumps(asdict(plan), indent=2) + "\n")
    except OSError as error:
        raise DataError(
            f"The folder {place} for kept states cannot be written ({error.strerror or error}): name another "
            "kept_states_dir, or make it writable."
        ) from error
    order = [image for shard in shards for image in plan.images_of(shard)]
    with Workers() as workers:
        loader = DataLoader(
            images,
            batch_size=None,
            sampler=order,
            prefetch_factor=8 if num_workers else None,
            **workers.options(num_workers),
        )
        pixels = iter(tqdm(workers.iterate(loader), "Keeping states", len(order), disable=not progress, unit="image"))
        for shard in shards:
            count = len(plan.images_of(shard))
            states = torch.zeros(count, 1 + plan.num_views, plan.num_states, plan.width, dtype=DTYPE)
            readable = torch.zeros(count, dtype=torch.bool)
            waiting: list[tuple[int, int, Tensor]] = []  # image, view, pixels
            for image in range(count):
                views = next(pixels)
                readable[image] = views is not None
                waiting += [(image, view, one) for view, one in enumerate(views if views is not None else ())]
                is_last = image + 1 == count
                while len(waiting) >= batch_size or (is_last and waiting):
                    _encode_into(states, waiting[:batch_size], encode)
                    waiting = waiting[batch_size:]
            _write(_shard_file(place, shard), {"states": states, "readable": readable})


@torch.no_grad()
def _encode_into(states: Tensor, batch: list[tuple[int, int, Tensor]], encode: Encode) -> None:
    """Encode a batch of views, and put their states where they belong."""
    images, views, pixels = zip(*batch, strict=True)
    encoded = encode(torch.stack(pixels)).to("cpu", DTYPE)
    if not encoded.isfinite().all():
        raise DataError(
            "The states of an image are too large for half precision: lock more layers, so that the states are "
            "normalised, or leave out kept_views and plain_view."
        )
    states[torch.tensor(images), torch.tensor(views)] = encoded


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard completely or not at all."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished)
        with open(unfinished, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, file)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise DataError(
            f"{file} could not be written ({error}): what was written before it stays. Make space, and run the same "
            "command again, which goes on there."
        ) from error
