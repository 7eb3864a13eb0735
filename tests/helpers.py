"""Tiny models, inputs, runs and golden files that the tests share.

It is imported before anything else of a test, and so sets the environment of all of them.
"""

import io
import json
import os
import runpy
import socket
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())  # removed when the tests end
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning thread pools on shared cores are far slower than one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from tcl_hf import TCLConfig, TCLForPreTraining, TCLImageProcessorPil, TCLProcessor
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.tokenizer import train_tokenizer
from tcl_hf.sharing.convert import from_original
from tcl_hf.sharing.hub import BackgroundPush
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.log import read_metrics
from tcl_hf.training.loop import TrainingRun

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
ANNOTATIONS = Path(__file__).parent / "fixtures" / "annotations"


SHARED = ROOT.parent / "shared"


def tiny_config(**fields) -> TCLConfig:
    """The size of the golden files, without dropout."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 2,
    } | fields.pop("vision_config", {})
    text = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "fusion_layer": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    } | fields.pop("text_config", {})
    return TCLConfig(vision_config=vision, text_config=text, **{"projection_dim": 16, "queue_size": 20, **fields})


# All parts of a vision encoder that only an encoder to start from has.
EVERY_VISION_PART = {"pre_layer_norm": True, "patch_bias": False, "num_register_tokens": 3, "use_swiglu_ffn": True}


def small_patches(**fields) -> TCLConfig:
    """A tiny config with few patches, for tests that run many steps."""
    return tiny_config(vision_config={"patch_size": 8} | fields.pop("vision_config", {}), **fields)


class Golden:
    """One golden file: the original's state, inputs, outputs, gradients, and state after the step."""

    def __init__(self, name: str):
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")

    def __getitem__(self, kind: str) -> dict[str, torch.Tensor]:
        prefix = f"{kind}."
        return {k.removeprefix(prefix): v.clone() for k, v in self.tensors.items() if k.startswith(prefix)}

    def load(self, model):
        """Give a model the original's weights, and check that nothing is left over on either side."""
        result = model.load_state_dict(from_original(self["state"], model.config), strict=False)
        assert not result.unexpected_keys
        # The original's pre-training checkpoints have no image ids, and its fine-tuned ones no weights of the contrast.
        contrast = {"tcl.temperature", *(key for key in result.missing_keys if "_projection." in key)}
        assert set(result.missing_keys) <= {"queue.ids"} | (contrast if "temp" not in self["state"] else set())
        return model


def training_batch(num_pairs: int = 4, length: int = 7, config: TCLConfig | None = None, seed: int = 0) -> dict:
    """A random batch with masked texts of different lengths."""
    config = config or small_patches()
    generator = torch.Generator().manual_seed(seed)
    size = config.vision_config.image_size
    vocab = config.text_config.vocab_size
    input_ids = torch.randint(5, vocab, (num_pairs, length), generator=generator)
    input_ids[:, 0] = 2
    attention_mask = torch.ones(num_pairs, length, dtype=torch.long)
    for row in range(num_pairs):
        attention_mask[row, length - row % 3 :] = 0
    input_ids = input_ids * attention_mask
    chosen = (torch.rand(num_pairs, length, generator=generator) < 0.3) & attention_mask.bool()
    chosen[:, 0] = False
    return {
        "pixel_values": torch.randn(num_pairs, 3, size, size, generator=generator),
        "pixel_values_augmented": torch.randn(num_pairs, 3, size, size, generator=generator),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mlm_input_ids": input_ids.masked_fill(chosen, 4),
        "mlm_labels": input_ids.masked_fill(~chosen, -100),
    }


WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "house",
    "car",
    "runs",
    "sits",
    "near",
    "big",
    "small",
    "tree",
    "photo",
    "of",
    "the",
    "on",
]


def tiny_processor(size: int = 32) -> TCLProcessor:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, vocab_size=80)
    return TCLProcessor(TCLImageProcessorPil(size={"height": size, "width": size}), tokenizer)


def png(color: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture whose pixels follow from `color`."""
    pixels = np.random.default_rng(color).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "PNG")
    return file.getvalue()


def photo(width: int = 96, height: int = 80, seed: int = 0) -> Image.Image:
    """An RGB image of smooth random fields with a little noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


TEXT = datasets.Value("string")
PICTURE = {"bytes": datasets.Value("binary"), "path": TEXT}  # an image column of parquet that `datasets` did not write


def image_at(path: str | Path) -> dict:
    return {"bytes": None, "path": str(path)}


def write_json(folder: Path, content, name: str = "rows.json") -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def write_table(file: Path, table: dict, features: dict) -> str:
    Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(file)
    return str(file)


def tiny_records(number: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": {"bytes": png(i), "path": None},
            "captions": [" ".join(rng.choice(WORDS, 4)) for _ in range(2)],
            "image_id": str(i),
        }
        for i in range(number)
    ]


def tiny_run(folder, records=None, model=None, evaluate=None, pairs=None, collator=None, **options):
    AcceleratorState._reset_state(True)  # An earlier run may have left its precision, as the reference does.
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
    } | options
    args = TCLTrainingArguments(output_dir=str(folder), **options)
    if model is None:
        torch.manual_seed(0)
        model = TCLForPreTraining(small_patches())
    if pairs is None:
        pairs = Dataset.from_list(tiny_records(12) if records is None else records)
    processor = tiny_processor()
    push = BackgroundPush(args.hub_model_id) if args.push_to_hub else None
    return TrainingRun(
        model, pairs, collator or TCLPreTrainingCollator(processor), processor, args, evaluate, push
    ).train()


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def task_inputs(name, inputs):
    """The inputs of a golden file under the names of our heads."""
    if name == "nlvr":
        inputs["pixel_values"] = torch.stack([inputs.pop("pixel_values_0"), inputs.pop("pixel_values_1")], dim=1)
    if name == "vqa":
        mask = inputs.pop("answer_attention_mask")
        inputs["labels"] = inputs.pop("answer_input_ids").masked_fill(mask == 0, -100)
        counts = inputs.pop("answers_per_question")
        inputs["question_index"] = torch.arange(len(counts)).repeat_interleave(counts)
        for key in ("candidate_input_ids", "candidate_attention_mask", "k"):
            inputs.pop(key)
    return inputs


def assert_teacher_equals_student(model):
    students = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in model.teacher.named_parameters():
        assert torch.equal(parameter, students[name]), name
        assert not parameter.requires_grad, name


class ReadBack(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations for whose result the host would have to wait on an accelerator."""

    SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "_to_cpu")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        if name in self.SYNCHRONISING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


CLS, SEP = 2, 3  # ids of the tiny vocabulary, as in the golden files


def config_of(**fields) -> TCLConfig:
    text = {"bos_token_id": CLS, "eos_token_id": SEP} | fields.pop("text_config", {})
    return small_patches(text_config=text, **fields)


def stir(model: nn.Module, by: float = 0.1, seed: int = 0) -> nn.Module:
    """Move every weight by noise, so that teacher and student, and all layers, are far apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def stirred(model_class: type, seed: int = 0, **fields) -> PreTrainedModel:
    torch.manual_seed(seed)
    return stir(model_class(config_of(**fields)), seed=seed)


def answers(number: int, longest: int = 6, shortest: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (number, longest) from [CLS] to [SEP], and masks: all lengths between, and different first words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 80, (number, longest), generator=generator)
    ids[:, 1] = 5 + torch.randperm(75, generator=generator)[:number]
    lengths = shortest + torch.arange(number) % (longest - shortest + 1)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids[:, 0] = CLS
    ids[torch.arange(number), lengths - 1] = SEP
    return ids * mask, mask


def questions_of(config: TCLConfig, number: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = training_batch(number, config=config, seed=seed)
    return {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}


PROCESSES = 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Processes of tests are forked from one that has imported everything, because importing takes ten seconds of a core.
FORKING = torch.multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["helpers"])  # which it finds by this path, not by ours
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])


def in_a_process(work, *args, cwd: Path = ROOT, timeout: float = 300, **environment: str) -> CompletedProcess:
    """Call a function in a process of its own, and give back its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        rest = (files, cwd, dict(os.environ) | environment, work, *args)
        process = FORKING.Process(target=as_process, args=rest)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{work.__name__}{args} still runs after {timeout} s")
        return CompletedProcess((work.__name__, *args), process.exitcode, *(file.read_text() for file in files))


def as_process(files: list[Path], cwd: Path, environment: dict[str, str], work, *args) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    work(*args)


def program(*argv: object) -> None:
    """Run what `python ARGV...` runs, with modules that are imported already; "-m" names a module."""
    module = argv[0] == "-m"
    sys.argv = [str(word) for word in (argv[1:] if module else argv)]
    sys.path[0:0] = [] if module else [str(Path(sys.argv[0]).parent)]
    (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")


def in_two_processes(worker, *args) -> None:
    rest = (free_port(), dict(os.environ), worker, *args)
    torch.multiprocessing.start_processes(as_rank, rest, nprocs=PROCESSES, start_method="forkserver")


def as_rank(rank: int, port: int, environment: dict[str, str], worker, *args) -> None:
    os.environ.update(environment)  # as it is now, and not as it was when the first process was forked
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    worker(rank, *args)


def picture(number: int) -> dict:
    return {"bytes": png(number), "path": None}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a file of this kind, for example "JPEG"."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def statements(labels: tuple[str, ...], number: int = 6, images: int = 1) -> list[dict]:
    rows = []
    for i in range(number):
        row = {"image_id": str(i), "captions": [f"a {WORDS[1 + i % 9]} dog"], "label": labels[i % len(labels)]}
        if images == 1:
            row["image"] = picture(i)
        else:
            row["images"] = [picture(2 * i), picture(2 * i + 1)]
            row["pair_id"] = f"dev-{i // 2}-{i}-0"
        rows.append(row)
    return rows


def labelled(classes: Sequence[str], number: int = 7) -> list[dict]:
    """Pictures that have the classes in turn."""
    labels = [classes[i % len(classes)] for i in range(number)]
    return [
        {"image": picture(i), "image_id": str(i), "captions": [label], "label": label} for i, label in enumerate(labels)
    ]


def questions(number: int = 5) -> list[dict]:
    return [
        {
            "image": picture(i),
            "image_id": str(i),
            "question": f"What is the {WORDS[1 + i]}, near?" if i % 2 else "big dog",
            "question_id": str(i),
            "answers": ["red", "red", "big cat"] if i else ["green"],
            "weight": 0.5 if i == 1 else 1.0,
        }
        for i in range(number)
    ]


def tiny(model_class, **fields):
    torch.manual_seed(0)
    processor = tiny_processor()
    ids = {"vocab_size": 80, "bos_token_id": 2, "eos_token_id": 3}
    return model_class(small_patches(text_config=ids, **fields)).eval(), processor


def phrases(number: int = 4) -> list[dict]:
    rows = []
    for i in range(number):
        caption = f"a big {WORDS[1 + i]} dog sits near the house"
        spans = [(0, caption.index(" sits"), [[2.0, 2.0, 20.0, 20.0]]), (caption.index("the house"), len(caption), [])]
        rows.append(
            {
                "image": picture(i),
                "image_id": str(i),
                "captions": ["not looked at", caption],
                "phrases": [
                    {
                        "caption_index": 1,
                        "start": a,
                        "end": b,
                        "types": ["animals"],
                        "boxes": boxes,
                        "phrase_id": f"{i}-{a}",
                    }
                    for a, b, boxes in spans
                ],
                "proposals": [[0.0, 0.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]] if i % 2 else [],
                "width": 40,
                "height": 30,
            }
        )
    return rows
