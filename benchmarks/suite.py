"""Ours beside its peers on the same work, in turns, in one run: `python benchmarks/suite.py [--only NAME ...]`.

A work has contenders: ours, the plain reference (`plain.py`), and models of transformers with encoders of the same
sizes, if they can do the work. Each contender has a process of its own for all rounds. They compute one after another,
in an order that is drawn for each round, so that a machine that slows down affects all of them and none is always
first. A ratio is a peer's time divided by ours in the same round; its median, least and most over the rounds are
printed.

In the rounds of the pre-training step the machine is measured too, before our step and after it: float32 matrix
products, written to memory that is already allocated, and the bandwidth of a copy.

The gain from each of our optimizations is measured in `ablation.py`; the original code is timed in `original.py`.
"""

import argparse
import atexit
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
OURS, PLAIN, MACHINE = "ours", "plain", "machine"
LENGTH, FEATURE_IMAGES, FEATURE_TEXTS = 25, 8, 32
FUSED_IMAGES, FUSED_TEXTS = 4, 4  # texts of each image
PART_OF_LOOPS = 4  # the plain loops of re-ranking run on one in 4 images and texts, and their time is multiplied by 4

LEAST_MEMORY = 2e7  # bytes; less than this is below the noise of allocators and libraries

Run = Callable[[], Any]  # does the work once; the results are compared where contenders must agree


@dataclass
class Work:
    """Something that several contenders can do.

    Args:
        title: title in the table.
        contenders: functions that prepare the contenders, by name; ours first.
        repeats: number of rounds.
        agree: whether all contenders must return the same numbers.
        memory: whether the peak memory of each is printed.
        trains: whether gradients are computed.
        scale: factor for the time of a contender that does only a share of the work, by name.
    """

    title: str
    contenders: dict[str, Callable[[], Run]]
    repeats: int = 5
    agree: bool = False
    memory: bool = False
    trains: bool = False
    scale: dict[str, float] = field(default_factory=dict)


# The pre-training step


def training_step(size: str, pairs: int, name: str) -> Run:
    from plain import PlainTCL
    from pretrain_step import SIZES, random_batch

    from tcl_hf import TCLConfig, TCLForPreTraining
    from tcl_hf.training.allocation import keep_freed_memory
    from tcl_hf.training.optimization import parameter_groups

    config = TCLConfig(**SIZES[size])
    if name == OURS:
        model: nn.Module = TCLForPreTraining(config).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-5, fused=True)
    else:
        model = with_small_weights(PlainTCL(config)).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-5)
    batch = random_batch(config, pairs, LENGTH)

    def step() -> None:
        model.update_teacher()
        model(**batch, alpha=0.4).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.held = partial(bytes_of_updates, model)  # type: ignore[attr-defined]
    if name == OURS:
        keep_freed_memory()  # as `train` does; set last, so that memory freed before counts as free before the step
    return step


def with_small_weights(model: nn.Module) -> nn.Module:
    """The model with weights of the same scale as ours."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def bytes_of_updates(model: nn.Module) -> int:
    """Gradients and AdamW's two moments, which a first step adds to what a model holds."""
    return 3 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def machine() -> Run:
    """Operations per second of a float32 matrix product, and bytes per second of a copy, read and written."""
    a, b = torch.randn(2, 2048, 2048).unbind()
    out = torch.empty_like(a)
    source = torch.randn(2**26)  # 256 MB
    target = torch.empty_like(source)

    def measure() -> list[float]:
        product, copy = [], []
        for _ in range(12):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            product.append(2 * 2048**3 / (time.perf_counter() - start))
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            copy.append(2 * source.nbytes / (time.perf_counter() - start))
        return [statistics.median(product), statistics.median(copy)]

    return measure


# Features and fusion


def model_of(name: str) -> nn.Module:
    """A model with encoders of the base size: 12 layers for images of 256 pixels, 6 for texts, and 6 that fuse."""
    from plain import PlainTCL
    from transformers import (
        BlipConfig,
        BlipForImageTextRetrieval,
        CLIPConfig,
        CLIPModel,
        FlavaConfig,
        FlavaForPreTraining,
    )

    from tcl_hf import TCLConfig, TCLForImageTextRetrieval

    image = {"image_size": 256, "patch_size": 16}
    text = {"num_hidden_layers": 6, "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072}
    heads = {"num_attention_heads": 12, "num_hidden_layers": 6}
    torch.manual_seed(0)
    if name == OURS:
        return TCLForImageTextRetrieval(TCLConfig(use_momentum_teacher=False)).eval()
    if name == PLAIN:
        return with_small_weights(PlainTCL(TCLConfig())).eval()
    if name == "CLIPModel":
        vision = image | {"hidden_size": 768, "intermediate_size": 3072, **heads, "num_hidden_layers": 12}
        text = text | heads | {"max_position_embeddings": 40, "hidden_act": "gelu"}
        vision |= {"hidden_act": "gelu"}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).eval()
    if name == "FlavaForPreTraining":
        config = FlavaConfig(
            image_config=image, text_config=text, multimodal_config={"num_hidden_layers": 6}, init_codebook=False
        )
        return FlavaForPreTraining(config).eval()
    vision = image | {"num_hidden_layers": 12}
    blip = BlipConfig(text_config=text | heads, vision_config=vision, image_text_hidden_size=256)
    return BlipForImageTextRetrieval(blip).eval()


def image_features(name: str) -> Run:
    from plain import plain_features

    model, images = model_of(name), torch.randn(FEATURE_IMAGES, 3, 256, 256)
    encode: dict[str, Run] = {
        OURS: lambda: model.tcl.get_image_features(images).pooler_output,
        PLAIN: lambda: plain_features(model, images),
        "CLIPModel": lambda: model.get_image_features(images),
        "FlavaForPreTraining": lambda: model.flava.get_image_features(images),
        "BlipForImageTextRetrieval": lambda: model.vision_proj(model.vision_model(images).last_hidden_state[:, 0]),
    }
    return encode[name]


def random_texts(number: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1000, 30522, (number, LENGTH))
    return ids, torch.ones_like(ids)


def text_features(name: str) -> Run:
    from plain import plain_features

    model, (ids, mask) = model_of(name), random_texts(FEATURE_TEXTS)
    encode: dict[str, Run] = {
        OURS: lambda: model.tcl.get_text_features(ids, mask).pooler_output,
        PLAIN: lambda: plain_features(model, input_ids=ids, attention_mask=mask),
        "CLIPModel": lambda: model.get_text_features(ids, mask),
        "FlavaForPreTraining": lambda: model.flava.get_text_features(ids, mask),
    }
    return encode[name]


def fusion(name: str) -> Run:
    """Pairs of encoded images and texts to matching scores; BLIP's six layers read the words themselves."""
    model, pairs = model_of(name), FUSED_IMAGES * FUSED_TEXTS
    images, (ids, mask) = torch.randn(FUSED_IMAGES, 257, 768), random_texts(pairs)
    texts = torch.randn(pairs, LENGTH, 768)

    def repeated() -> Tensor:
        return images.repeat_interleave(FUSED_TEXTS, dim=0)

    def flava() -> Tensor:
        multimodal = model.flava.multimodal_model
        joined = torch.cat([repeated(), texts], dim=1)
        return multimodal(joined, torch.cat([mask.new_ones(pairs, 257), mask], dim=1)).last_hidden_state[:, 0]

    def blip() -> Tensor:
        seen = {"encoder_hidden_states": repeated(), "encoder_attention_mask": mask.new_ones(pairs, 257)}
        return model.itm_head(model.text_encoder(ids, mask, **seen).last_hidden_state[:, 0])

    fuse: dict[str, Run] = {
        OURS: lambda: model.match(texts, mask, images),
        PLAIN: lambda: model.match(texts, mask, repeated()),
        "FlavaForPreTraining": flava,
        "BlipForImageTextRetrieval": blip,
    }
    return fuse[name]


# Evaluation


def reranking(name: str) -> Run:
    from original import IMAGES, K_RETRIEVAL, TEXTS, OurReranking
    from plain import PlainTCL, plain_rerank

    from tcl_hf.evaluation.retrieval import matching_scores

    with tempfile.TemporaryDirectory() as folder:
        own = OurReranking(Path(folder) / "work.pt")
    if name == OURS:
        return lambda: best_scores(matching_scores(own.model, own.pairs, K_RETRIEVAL), own.pairs)
    plain = PlainTCL(own.model.config).eval()
    plain.load_state_dict(own.model.state_dict(), strict=False)
    images, texts = range(0, IMAGES, PART_OF_LOOPS), range(0, TEXTS, PART_OF_LOOPS)
    return lambda: best_scores(plain_rerank(plain, own.pairs, K_RETRIEVAL, images, texts)[0], own.pairs)


def best_scores(scores: Tensor, pairs: Any) -> Tensor:
    """The scores of some images with their most similar texts, which all contenders compute."""
    top = pairs.similarity().topk(8, dim=1).indices
    return scores.gather(1, top)[::PART_OF_LOOPS]


def answers(name: str) -> Run:
    from original import K_ANSWERS, OurAnswers
    from plain import PlainAnswerDecoder, plain_rank_answers

    with tempfile.TemporaryDirectory() as folder:
        own = OurAnswers(Path(folder) / "work.pt")
    if name == OURS:
        return lambda: own.model._rank(*own.inputs.values(), k=K_ANSWERS, chunk_size=2048).probabilities
    decoder = PlainAnswerDecoder(own.model.text_decoder.config).eval()
    decoder.load_state_dict(own.model.text_decoder.state_dict())
    return lambda: plain_rank_answers(decoder, *own.inputs.values(), k=K_ANSWERS).probabilities


# Parts


def local_loss(num_samples: int, name: str) -> Run:
    """Value and gradient of LMI with 16 locals of 256 numbers each."""
    from plain import plain_lmi_loss

    from tcl_hf.models.losses import lmi_loss

    torch.manual_seed(0)
    features = nn.functional.normalize(torch.randn(num_samples, 256), dim=-1).requires_grad_()
    parts = nn.functional.normalize(torch.randn(num_samples, 16, 256), dim=-1)
    temperature = torch.tensor(0.07)
    loss = lmi_loss if name == OURS else plain_lmi_loss

    def both() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(features, parts, temperature), features)
        return gradient.flatten()[:64] * num_samples

    return both


def views(name: str) -> Run:
    """Two augmented views of 256 pixels of eight JPEGs of 500 x 375, decoded."""
    from data_pipeline import MEAN, SIZE, STD, PlainAugmentation, photo, seeded

    from tcl_hf.data.augmentation import TCLAugmentation

    torch.set_num_threads(1)
    augmentation = (TCLAugmentation if name == OURS else PlainAugmentation)(SIZE, MEAN, STD)
    files = [photo(seed) for seed in range(8)]
    return lambda: torch.stack([seeded(augmentation, file, i)[0].mean() for i, file in enumerate(files)])


def loading(name: str) -> Run:
    """Open a checkpoint of the base size with teacher and queues; ours compares checksums, and reads safetensors."""
    from plain import PlainTCL

    from tcl_hf import TCLConfig, TCLForPreTraining

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = TCLForPreTraining(TCLConfig())
    if name == OURS:
        model.save_pretrained(folder)
        return lambda: TCLForPreTraining.from_pretrained(folder)
    torch.save(model.state_dict(), f"{folder}/model.pth")

    def load() -> nn.Module:
        plain = PlainTCL(model.config)
        plain.load_state_dict(torch.load(f"{folder}/model.pth", map_location="cpu"))
        return plain

    return load


FOUR = [OURS, PLAIN, "CLIPModel", "FlavaForPreTraining"]


def all_with(prepare: Callable[..., Run], names: list[str], *arguments: Any) -> dict[str, Callable[[], Run]]:
    return {name: partial(prepare, *arguments, name) for name in names}


TWO = [OURS, PLAIN]
WORKS = {
    "step": Work(
        "pre-training step, base, 4 pairs",
        all_with(training_step, TWO, "base", 4) | {MACHINE: machine},
        repeats=7,
        memory=True,
        trains=True,
    ),
    "step8": Work(
        "pre-training step, base, 8 pairs", all_with(training_step, TWO, "base", 8), 3, memory=True, trains=True
    ),
    "small": Work(
        "pre-training step, small, 32 pairs", all_with(training_step, TWO, "small", 32), memory=True, trains=True
    ),
    "images": Work(
        f"features of {FEATURE_IMAGES} images", all_with(image_features, [*FOUR, "BlipForImageTextRetrieval"])
    ),
    "texts": Work(f"features of {FEATURE_TEXTS} texts", all_with(text_features, FOUR), 9),
    "fusion": Work(
        f"fusion of {FUSED_IMAGES} images with {FUSED_TEXTS} texts each",
        all_with(fusion, [OURS, PLAIN, "FlavaForPreTraining", "BlipForImageTextRetrieval"]),
        9,
    ),
    "rerank": Work(
        "re-ranking, 40 images x 200 texts, k = 16", all_with(reranking, TWO), 2, True, scale={PLAIN: PART_OF_LOOPS}
    ),
    "answers": Work("ranking 3,128 answers, k = 128, 2 questions", all_with(answers, TWO), agree=True),
    **{
        f"lmi{n}": Work(f"LMI, N = {n}, L = 16", all_with(local_loss, TWO, n), agree=True, memory=True, trains=True)
        for n in (64, 256, 1024)
    },
    "views": Work("8 JPEGs to two views each, 1 thread", all_with(views, TWO), 9, True),
    "load": Work("opening a checkpoint of the base size", all_with(loading, TWO)),
}


# A contender's process


def answer_requests(work: str, name: str) -> None:
    """Prepare a contender, then do its work once for each line that is read, and print seconds, memory and numbers."""
    from original import peak_bytes

    torch.manual_seed(0)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard the output of libraries
    run = WORKS[work].contenders[name]()
    before, peak_before = resident_bytes(), peak_bytes()
    held = getattr(run, "held", int)
    with torch.set_grad_enabled(WORKS[work].trains):
        print(json.dumps("ready"), file=channel, flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            found = run()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
            # The peak of a run is unknown where it was not above that of the preparation.
            answer["activations"] = peak_bytes() - before - held() if peak_bytes() > peak_before else 0
            if WORKS[work].agree or name == MACHINE:
                answer["numbers"] = found.flatten().tolist() if isinstance(found, Tensor) else found
            print(json.dumps(answer), file=channel, flush=True)


def resident_bytes() -> int:
    """The resident memory of this process now."""
    pages = Path("/proc/self/statm").read_text().split()[1] if sys.platform == "linux" else "0"
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Contender:
    """A process that prepares its work, prints once that it is ready, and does the work when asked."""

    def __init__(self, work: str, name: str):
        command = [sys.executable, __file__, "--child", work, name]
        environment = os.environ | {
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)

    def ask(self) -> dict[str, Any]:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[-2:]} ended with {self.process.wait()}: see its error above.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def order_of(contenders: Iterable[str], number: int) -> list[str]:
    """The order of a round: drawn at random, but the machine is measured just before ours and just after."""
    peers = [who for who in contenders if who != MACHINE]
    order = random.Random(number).sample(peers, len(peers))
    if MACHINE in contenders:
        place = order.index(OURS)
        order[place : place + 1] = [MACHINE, OURS, MACHINE]
    return order


def measure(name: str, repeats: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each contender of a work in each round, without the first round, which allocates memory."""
    work = WORKS[name]
    contenders = {who: Contender(name, who) for who in work.contenders}
    for contender in contenders.values():  # all prepare at once
        contender.read()
    measured: dict[str, list[dict[str, Any]]] = {who: [] for who in contenders}
    for number in range((repeats or work.repeats) + 1):
        for who in order_of(contenders, number):
            answer = contenders[who].ask()
            answer["seconds"] *= work.scale.get(who, 1.0)
            if number:
                measured[who].append(answer)
    for contender in contenders.values():
        contender.close()
    if work.agree:
        ours = torch.tensor(measured[OURS][0]["numbers"])
        for who, runs in measured.items():
            torch.testing.assert_close(
                torch.tensor(runs[0]["numbers"]), ours, rtol=1e-4, atol=1e-5, msg=f"{name}: {who}"
            )
    return measured


# Tables


@dataclass
class Row:
    """A row of the table: a peer beside ours."""

    work: str
    peer: str
    ours: list[float]
    theirs: list[float]
    ours_memory: float = 0.0  # bytes
    theirs_memory: float = 0.0

    @property
    def ratios(self) -> list[float]:
        return [theirs / own for theirs, own in zip(self.theirs, self.ours, strict=True)]

    def cells(self) -> str:
        seconds = [f"{statistics.median(x):.3g}" for x in (self.ours, self.theirs)]
        ratio = f"{statistics.median(self.ratios):.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        memory = ["", "", ""]
        if self.ours_memory > LEAST_MEMORY and self.theirs_memory > LEAST_MEMORY:
            memory = [f"{x / 1e9:.2f}" for x in (self.ours_memory, self.theirs_memory)]
            memory.append(f"{self.ours_memory / self.theirs_memory:.2f}")
        return " | ".join([self.work, self.peer, *seconds, ratio, *memory])


def rows_of(name: str, measured: dict[str, list[dict[str, Any]]]) -> list[Row]:
    work = WORKS[name]
    rows = []
    for who, runs in measured.items():
        if who in (OURS, MACHINE):
            continue
        row = Row(work.title, who, *([a["seconds"] for a in x] for x in (measured[OURS], runs)))
        if work.memory:
            row.ours_memory, row.theirs_memory = (max(a["activations"] for a in x) for x in (measured[OURS], runs))
        rows.append(row)
    return rows


def start_up_rows(repeats: int) -> list[Row]:
    from start_up import BEYOND
    from start_up import measure as start_ups

    seconds = start_ups(repeats)
    own, theirs = (seconds[f"{name}, beyond these"] for name in BEYOND)
    return [Row("import, beyond torch and PreTrainedModel, ProcessorMixin", list(BEYOND)[1], own, theirs)]


def limits(measured: dict[str, list[dict[str, Any]]]) -> str:
    """A paragraph with the machine's speed in the rounds of the step, and the share of it that the step reaches."""
    from pretrain_step import random_batch

    from tcl_hf import TCLConfig
    from tcl_hf.training.operations import run_step

    config = TCLConfig()
    masked = random_batch(config, 4, LENGTH)["mlm_positions"].shape[1]
    flops = run_step(config, 4, LENGTH, num_masked=masked).flops
    products, copies = zip(*(answer["numbers"] for answer in measured[MACHINE]), strict=True)
    around = [statistics.mean(pair) for pair in zip(products[::2], products[1::2], strict=True)]
    shares = [flops / a["seconds"] / product for a, product in zip(measured[OURS], around, strict=True)]
    return (
        f"This machine in the rounds of the step: {statistics.median(products) / 1e9:.0f} GFLOP/s "
        f"({min(products) / 1e9:.0f} to {max(products) / 1e9:.0f}) of float32 matrix products, "
        f"{statistics.median(copies) / 1e9:.1f} GB/s ({min(copies) / 1e9:.1f} to {max(copies) / 1e9:.1f}) of a copy. "
        f"The step has {flops / 1e9:.0f} GFLOP of products: {statistics.median(shares):.0%} "
        f"({min(shares):.0%} to {max(shares):.0%}) of that speed."
    )


HEADER = (
    "| work | peer | ours, s | peer, s | times faster (least to most) | ours, GB | peer, GB | share |\n"
    "|---|---|---:|---:|---|---:|---:|---:|"
)


def plot(rows: list[Row], path: Path) -> None:
    """Plot how many times faster ours is than each peer, with the least and the most, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    for place, row in enumerate(reversed(rows)):
        middle = statistics.median(row.ratios)
        color = {PLAIN: "#3b6ea5"}.get(row.peer, "#c98a2b")
        axes.barh(place, middle - 1, left=1, color=color)
        axes.plot([min(row.ratios), max(row.ratios)], [place, place], color="black", linewidth=1)
        axes.text(max(row.ratios) * 1.03, place, f"{middle:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row.work}: {row.peer}" for row in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than the peer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*WORKS, "start_up"], help="only these works")
    parser.add_argument("--repeats", type=int, help="rounds of each work, in place of its default")
    parser.add_argument("--plot", type=Path, help="image file for a plot of the ratios")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if args.child:
        answer_requests(*args.child)
        return
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
    works, rows, speed_of_machine = args.only or [*WORKS, "start_up"], [], ""
    for name in tqdm(works, desc="works"):
        if name == "start_up":
            rows += start_up_rows(args.repeats or 3)
            continue
        measured = measure(name, args.repeats)
        rows += rows_of(name, measured)
        if MACHINE in measured:
            speed_of_machine = limits(measured)
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{date.today()}, {cores}, torch {torch.__version__}, float32\n")
    print(speed_of_machine + "\n")
    print(HEADER)
    for row in rows:
        print(f"| {row.cells()} |")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
