"""Time ours against the original code on the same work: `python benchmarks/original.py --checkout FOLDER`.

The works are a pre-training step, re-ranked retrieval, ranking of answers, and features, at the base size with the same
weights (ours, converted) and inputs, in float32 on the CPU. Values are compared before anything is timed: the losses of
a step and the norms of all gradients (with dropout 0 and the same negatives and masked words), matching scores,
probabilities of answers, and features. Each side has a process of its own for each work, with the same number of
threads; they compute in turn.

No part of the original is in this repository. Clone its code, https://github.com/uta-smile/TCL (the published figures
are of commit 74a3e4f), to FOLDER. Besides torch, numpy and yaml, which ours needs too, it needs transformers 4.30.2
with tokenizers 0.13.3, huggingface_hub below 1.0 and requests (with urllib3, certifi, charset-normalizer), and timm
0.4.9.
Install them by `pip install --no-deps --target PACKAGES ...`, where they do not replace ours, and pass
`--packages PACKAGES`; or pass another interpreter that has them as `--python`.

The original's files are not changed. The benchmark changes from outside that
- transformers' decorator of docstrings takes an argument that it took in the version of the original;
- `from_pretrained` of its BERT makes the model from its config, without downloading weights that are then replaced;
- its modules of data sets, which are not used, and ruamel_yaml are empty;
- the process is a process group of one (gloo), which its queues need;
- its evaluation of retrieval gets encoded states, so that only scoring is timed. A run computes one of `--shares`
  shares of its loops, and its time is scaled to that of all pairs, because every pair takes the same time;
- for the comparison of values, dropout is 0, and negatives and masked words are given.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ALPHA = 0.4  # the share of soft targets in the losses
PAIRS, LENGTH = 4, 25  # the size of a pre-training step
IMAGES, TEXTS, K_RETRIEVAL, MAX_TOKENS = 40, 200, 16, 30
QUESTIONS, QUESTION_LENGTH, CANDIDATES, K_ANSWERS = 2, 14, 3128, 128
FEATURE_IMAGES, FEATURE_TEXTS = 8, 32
NOT_SCORED = -100.0
TITLES = {
    "step": f"pre-training step, {PAIRS} pairs of {LENGTH} tokens",
    "rerank": f"re-ranked retrieval, {IMAGES} images x {TEXTS} texts of 8 to {MAX_TOKENS} tokens, k = {K_RETRIEVAL}",
    "vqa": f"ranking of {CANDIDATES} answers to {QUESTIONS} questions, k = {K_ANSWERS}, decoder",
    "features": f"features of {FEATURE_IMAGES} images and {FEATURE_TEXTS} texts of {LENGTH} tokens",
}


# --- Our side, which makes the weights and the inputs ---


class OurStep:
    """A pre-training step: the teacher's update, forward, backward and optimizer."""

    def __init__(self, file: Path):
        from pretrain_step import random_batch

        from tcl_hf import TCLConfig, TCLForPreTraining
        from tcl_hf.training.allocation import keep_freed_memory
        from tcl_hf.training.optimization import parameter_groups

        keep_freed_memory()  # as `train` does
        self.libraries = peak_bytes()
        self.model = TCLForPreTraining(TCLConfig()).train()
        for parameter in self.model.teacher.parameters():
            parameter.data.mul_(0.9)  # a teacher that differs from its student
        self.batch = random_batch(self.model.config, PAIRS, LENGTH)
        rows = torch.arange(PAIRS)
        self.negatives = [(rows + 1) % PAIRS, (rows + 2) % PAIRS]  # images of texts, texts of images
        save_work(file, self.model, **self.batch, negatives=self.negatives)
        # Both sides decay the same parameters.
        groups = parameter_groups(self.model, 0.02, rule="original")
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def values(self) -> dict[str, Any]:
        """Losses and norms of gradients, by the original's names."""
        import tcl_hf.models.modeling_tcl as modeling
        from tcl_hf.sharing.original_names import original_names

        drawn, exist = iter(self.negatives), torch.ones(PAIRS, dtype=torch.bool)
        with (
            without_dropout(self.model),
            replaced(modeling, "sample_hard_negatives", lambda *inputs: (next(drawn), exist)),
        ):
            self.model.update_teacher()
            output = self.model(**self.batch, alpha=ALPHA)
            output.loss.backward()
        config = self.model.config
        loss_ita = sum(getattr(config, f"{x}_weight") * output[f"loss_{x}"] for x in ("cma", "imc", "lmi"))
        values = {"mlm": output.loss_mlm.item(), "ita": loss_ita.item(), "itm": output.loss_itm.item()}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for row in original_names(config, "pretrain"):
            parts = [parameters[name].grad for name in row.ours if name in parameters]
            if parts and all(part is not None for part in parts):
                values[f"gradient {row.original}"] = math.hypot(*(part.norm().item() for part in parts))
        self.optimizer.zero_grad()
        return values

    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.update_teacher()
        self.model(**self.batch, alpha=ALPHA).loss.backward()
        self.optimizer.step()
        return {"seconds": time.perf_counter() - start}

    def held(self) -> dict[str, int]:
        return held_bytes(self.model, self.optimizer)


class OurReranking:
    """Matching scores of the candidates of images and texts, from their encoded states."""

    def __init__(self, file: Path):
        from tcl_hf import TCLConfig, TCLForImageTextRetrieval
        from tcl_hf.evaluation.retrieval import EncodedSamples

        config = TCLConfig(use_momentum_teacher=False)
        self.model = TCLForImageTextRetrieval(config).eval()
        image_states = torch.randn(IMAGES, 1 + num_patches(config), config.vision_config.hidden_size)
        text_states = torch.randn(TEXTS, MAX_TOKENS, config.text_config.hidden_size)
        mask = (torch.arange(MAX_TOKENS) < torch.randint(8, MAX_TOKENS + 1, (TEXTS, 1))).long()
        save_work(file, self.model, image_states=image_states, text_states=text_states, attention_mask=mask)
        with torch.no_grad():
            self.pairs = EncodedSamples(
                image_rows=list(range(IMAGES)),
                image_states=image_states,
                text_states=text_states,
                attention_mask=mask,
                image_embeds=self.model.tcl.image_features(image_states),
                text_embeds=self.model.tcl.text_features(text_states),
                image_of_text=torch.arange(TEXTS) % IMAGES,
                texts=[],
            )

    def values(self) -> dict[str, Any]:
        return self.run(0)["values"]

    def run(self, number: int) -> dict[str, Any]:
        from tcl_hf.evaluation.retrieval import matching_scores

        start = time.perf_counter()
        scores = matching_scores(self.model, self.pairs, K_RETRIEVAL)
        return {"seconds": time.perf_counter() - start, "values": scored_pairs(scores)}


class OurAnswers:
    """Ranking of answers to questions, from the questions' encoded states."""

    def __init__(self, file: Path):
        from tcl_hf import TCLConfig, TCLForQuestionAnswering

        config = TCLConfig(use_momentum_teacher=False)
        self.model = TCLForQuestionAnswering(config).eval()
        text = config.text_config
        # Mostly one token, as the answers of VQA. All first tokens differ, so that the k best are never tied.
        counts = torch.multinomial(torch.tensor([0.7, 0.2, 0.06, 0.02, 0.01, 0.01]), CANDIDATES, replacement=True) + 1
        ids = torch.randint(1000, text.vocab_size, (CANDIDATES, 8))
        ids[:, 0] = 101
        ids[:, 1] = 1000 + torch.randperm(text.vocab_size - 1000)[:CANDIDATES]
        ids[torch.arange(CANDIDATES), counts + 1] = 102
        mask = (torch.arange(8) < counts[:, None] + 2).long()
        questions = torch.randn(QUESTIONS, QUESTION_LENGTH, text.hidden_size)
        question_mask = (torch.arange(QUESTION_LENGTH) < QUESTION_LENGTH - 3 * torch.arange(QUESTIONS)[:, None]).long()
        inputs = {"question_states": questions, "question_mask": question_mask}
        self.inputs = inputs | {"candidate_ids": ids.masked_fill(mask == 0, 0), "candidate_mask": mask}
        save_work(file, self.model, **self.inputs)

    def values(self) -> dict[str, Any]:
        return self.run(0)["values"]

    @torch.no_grad()
    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        ranked = self.model._rank(*self.inputs.values(), k=K_ANSWERS, chunk_size=2048)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "values": ranked_answers(ranked.indices, ranked.probabilities)}


class OurFeatures:
    """Features of images and of texts."""

    def __init__(self, file: Path):
        from tcl_hf import TCLConfig, TCLForImageTextRetrieval

        config = TCLConfig(use_momentum_teacher=False)
        self.model = TCLForImageTextRetrieval(config).eval()
        size = config.vision_config.image_size
        self.images = torch.randn(FEATURE_IMAGES, 3, size, size)
        self.ids = torch.randint(1000, config.text_config.vocab_size, (FEATURE_TEXTS, LENGTH))
        self.mask = torch.ones_like(self.ids)
        save_work(file, self.model, images=self.images, input_ids=self.ids, attention_mask=self.mask)

    def values(self) -> dict[str, Any]:
        return self.run(0)["values"]

    @torch.no_grad()
    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        image = self.model.tcl.get_image_features(self.images).pooler_output
        middle = time.perf_counter()
        text = self.model.tcl.get_text_features(self.ids, self.mask).pooler_output
        return timed_features(start, middle, time.perf_counter(), image, text)


def num_patches(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def save_work(file: Path, model: nn.Module, **inputs: Any) -> None:
    """Write a model, in the original's names, and its inputs for the other side."""
    from tcl_hf.sharing.convert import to_original

    torch.save({"model": to_original(model), "inputs": inputs}, file)


# --- The original's side ---


class OriginalCode:
    """The original's modules, its recipes, and models filled with our weights."""

    def __init__(self, checkout: Path):
        self.checkout = checkout
        sys.path.insert(0, str(checkout))
        import transformers.file_utils as file_utils

        with replaced(file_utils, "add_code_sample_docstrings", lambda **kwargs: lambda function: function):
            from models import xbert
        xbert.BertPreTrainedModel.from_pretrained = classmethod(
            lambda cls, name, config, **kwargs: cls(config, **kwargs)
        )
        data = ModuleType("dataset")
        data.create_dataset = data.create_sampler = data.create_loader = None
        sys.modules |= {"dataset": data, "ruamel_yaml": ModuleType("ruamel_yaml")}
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def config(self, name: str, **fields: Any) -> dict[str, Any]:
        """One of the original's recipes, for images of our size."""
        import yaml

        recipe = yaml.safe_load((self.checkout / "configs" / f"{name}.yaml").read_text())
        recipe["optimizer"]["lr"] = float(recipe["optimizer"]["lr"])  # yaml reads "1e-4" as a string
        return recipe | {"bert_config": str(self.checkout / recipe["bert_config"]), "image_res": 256} | fields

    def load(self, model: nn.Module, file: Path) -> dict[str, Any]:
        """Fill a model with our weights, and return the inputs. Only teachers and queues may be missing."""
        work = torch.load(file, mmap=True)
        result = model.load_state_dict(work["model"], strict=False)
        missing = [name for name in result.missing_keys if "_m." not in name and "queue" not in name]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"The models differ: missing are {missing}, unexpected {result.unexpected_keys}.")
        return {name: copied(value) for name, value in work["inputs"].items()}


def copied(value: Any) -> Any:
    """Tensors of a mapped file, in memory."""
    return value.clone() if isinstance(value, Tensor) else [part.clone() for part in value]


class OriginalStep:
    """A pre-training step, as in the loop of the original's Pretrain.py."""

    def __init__(self, code: OriginalCode, file: Path):
        import models.model_pretrain as modeling
        import optim
        import utils

        self.libraries = peak_bytes()
        config = code.config("Pretrain")
        tokenizer = SimpleNamespace(pad_token_id=0, cls_token_id=101, mask_token_id=103)
        self.model = modeling.ALBEF(config=config, tokenizer=tokenizer, init_deit=False).train()
        self.batch = code.load(self.model, file)
        self.optimizer = optim.create_optimizer(utils.AttrDict(config["optimizer"]), self.model)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        text = SimpleNamespace(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"])
        return self.model(self.batch["pixel_values"], self.batch["pixel_values_augmented"], text, alpha=ALPHA)

    def values(self) -> dict[str, Any]:
        drawn = iter(torch.cat(self.batch["negatives"]))
        masked = (self.batch["mlm_input_ids"], self.batch["mlm_labels"])
        with (
            without_dropout(self.model),
            replaced(torch, "multinomial", lambda *inputs: next(drawn)),
            replaced(self.model, "mask", lambda *inputs, **named: masked),
        ):
            losses = self.losses()
            sum(losses).backward()
        values = {name: loss.item() for name, loss in zip(("mlm", "ita", "itm"), losses, strict=True)}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                values[f"gradient {name}"] = parameter.grad.norm().item()
        self.optimizer.zero_grad()
        return values

    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        sum(self.losses()).backward()
        self.optimizer.step()
        return {"seconds": time.perf_counter() - start}

    def held(self) -> dict[str, int]:
        return held_bytes(self.model, self.optimizer)


class OriginalReranking:
    """The original's `evaluation` of retrieval, on encoded states."""

    def __init__(self, code: OriginalCode, file: Path, shares: int):
        import Retrieval

        config = code.config("Retrieval_flickr")
        self.model = Retrieval.ALBEF(config=config).eval()
        self.inputs, self.shares = code.load(self.model, file), shares
        self.evaluation, self.utils = Retrieval.evaluation, Retrieval.utils
        Retrieval.args = SimpleNamespace(distributed=False)  # set by its main function otherwise

    def values(self) -> dict[str, Any]:
        return self._score(0, 16)["values"]

    def run(self, number: int) -> dict[str, Any]:
        return self._score(number % self.shares, self.shares)

    def _score(self, share: int, shares: int) -> dict[str, Any]:
        """The scores of one of several shares, and the seconds that all pairs would take at the same speed."""
        text_states, mask = self.inputs["text_states"], self.inputs["attention_mask"]

        def tokenizer(rows: list[int], **kwargs: Any) -> Any:
            tokens = SimpleNamespace(input_ids=torch.tensor(rows), attention_mask=mask[rows])
            tokens.to = lambda device: tokens
            return tokens

        def text_encoder(rows: Tensor | None = None, mode: str = "", **kwargs: Any) -> Any:
            if mode == "text":
                return SimpleNamespace(last_hidden_state=text_states[rows])
            return self.model.text_encoder(mode=mode, **kwargs)

        class Encoded(list):
            dataset = SimpleNamespace(text=list(range(TEXTS)), image=list(range(IMAGES)))

        model = SimpleNamespace(eval=self.model.eval, text_encoder=text_encoder, visual_encoder=nn.Identity())
        for name in ("vision_proj", "text_proj", "itm_head"):
            setattr(model, name, getattr(self.model, name))
        images = Encoded([(self.inputs["image_states"], torch.arange(IMAGES))])
        with (
            replaced(self.utils, "get_rank", lambda: share),
            replaced(self.utils, "get_world_size", lambda: shares),
        ):
            start = time.perf_counter()
            both = self.evaluation(model, images, tokenizer, torch.device("cpu"), {"k_test": K_RETRIEVAL})
            seconds = time.perf_counter() - start
        image_scores, text_scores = (torch.from_numpy(scores) for scores in both)
        number = int((image_scores != NOT_SCORED).sum() + (text_scores != NOT_SCORED).sum())
        values = scored_pairs(image_scores) | scored_pairs(text_scores.T)
        return {"seconds": seconds * K_RETRIEVAL * (IMAGES + TEXTS) / number, "values": values}


class OriginalAnswers:
    """The original's `rank_answer`."""

    def __init__(self, code: OriginalCode, file: Path):
        from models.model_vqa import ALBEF

        config = code.config("VQA", distill=False)
        self.model = ALBEF(config=config, tokenizer=SimpleNamespace(pad_token_id=0)).eval()
        self.inputs = code.load(self.model, file)

    def values(self) -> dict[str, Any]:
        return self.run(0)["values"]

    @torch.no_grad()
    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        indices, probabilities = self.model.rank_answer(*self.inputs.values(), K_ANSWERS)
        return {"seconds": time.perf_counter() - start, "values": ranked_answers(indices, probabilities)}


class OriginalFeatures:
    """Features, as in the original's evaluation."""

    def __init__(self, code: OriginalCode, file: Path):
        from models.model_retrieval import ALBEF

        self.model = ALBEF(config=code.config("Retrieval_flickr")).eval()
        self.images, self.ids, self.mask = code.load(self.model, file).values()

    def values(self) -> dict[str, Any]:
        return self.run(0)["values"]

    @torch.no_grad()
    def run(self, number: int) -> dict[str, Any]:
        model, normalize = self.model, nn.functional.normalize
        start = time.perf_counter()
        image = normalize(model.vision_proj(model.visual_encoder(self.images)[:, 0, :]), dim=-1)
        middle = time.perf_counter()
        states = model.text_encoder(self.ids, attention_mask=self.mask, mode="text").last_hidden_state
        text = normalize(model.text_proj(states[:, 0, :]))
        return timed_features(start, middle, time.perf_counter(), image, text)


# --- Both sides ---


@contextmanager
def replaced(owner: Any, name: str, value: Any):
    """Give an attribute another value within a `with` block."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextmanager
def without_dropout(model: nn.Module):
    """Set all dropout to 0 within a `with` block: that of modules, and that of our attention, which is a number."""
    kept = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout"
        if isinstance(getattr(module, name, None), float):
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The bytes that a step keeps, each tensor counted once. The teacher's parameters are those without gradient."""
    parameters = list(model.parameters())
    tensors = {
        "weights": [p for p in parameters if p.requires_grad],
        "teacher": [p for p in parameters if not p.requires_grad],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "AdamW": [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)],
        "queues": list(model.buffers()),
    }
    return {name: sum(value.numel() * value.element_size() for value in part) for name, part in tensors.items()}


def scored_pairs(scores: Tensor) -> dict[str, float]:
    """The scores of those pairs of a matrix (I, T) that have one."""
    return {f"image {i}, text {t}": scores[i, t].item() for i, t in (scores != NOT_SCORED).nonzero().tolist()}


def ranked_answers(indices: Tensor, probabilities: Tensor) -> dict[str, float]:
    """The probabilities (N, k) of the answers that were ranked."""
    return {
        f"question {n}, answer {answer}": probability
        for n in range(len(indices))
        for answer, probability in zip(indices[n].tolist(), probabilities[n].tolist(), strict=True)
    }


def timed_features(start: float, middle: float, end: float, image: Tensor, text: Tensor) -> dict[str, Any]:
    """Seconds of images and of texts, and the features (B, D) of both."""
    values = {f"image {i}": row for i, row in enumerate(image.tolist())}
    values |= {f"text {i}": row for i, row in enumerate(text.tolist())}
    return {"seconds": {"images": middle - start, "texts": end - middle}, "values": values}


def peak_bytes() -> int:
    """The peak of this process's resident memory."""
    unit = 1024 if sys.platform == "linux" else 1  # kilobytes, or bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def answer_requests(args: argparse.Namespace) -> None:
    """The process of a side: prepare the work, then answer each line of JSON with another."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what the original prints
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    file, work = Path(args.file), None
    if args.side == "ours":
        work = {"step": OurStep, "rerank": OurReranking, "vqa": OurAnswers, "features": OurFeatures}[args.only](file)
    else:
        code = OriginalCode(Path(args.checkout))
        if args.only == "rerank":
            work = OriginalReranking(code, file, args.shares)
        else:
            work = {"step": OriginalStep, "vqa": OriginalAnswers, "features": OriginalFeatures}[args.only](code, file)
    ready = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(ready), file=channel, flush=True)
    prepared = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request == "values":
            answer = work.values()
            prepared = peak_bytes()
        elif request == "memory":
            answer = {"peak": peak_bytes(), "before the steps": prepared, "libraries": work.libraries}
            answer["held"] = work.held()
        else:
            answer = work.run(request)
        print(json.dumps(answer), file=channel, flush=True)


# --- The parent ---


class Side:
    """A process that computes when asked."""

    def __init__(self, name: str, part: str, file: Path, args: argparse.Namespace):
        self.name = name
        python, environment = sys.executable, os.environ | {"PYTHONWARNINGS": "ignore"}
        if name == "original":
            python = args.python or python
            environment.pop("PYTHONPATH", None)  # it has other versions of the same packages
            if args.packages:
                environment["PYTHONPATH"] = str(Path(args.packages).resolve())
        command = [python, __file__, "--side", name, "--only", part, "--file", str(file)]
        command += ["--checkout", str(Path(args.checkout).resolve()), "--shares", str(args.shares)]
        command += ["--threads", str(args.threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.ready = self._answer()

    def ask(self, request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.name} ended with {self.process.wait()}: see its error above.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def largest_difference(ours: dict[str, Any], original: dict[str, Any]) -> float:
    """The largest difference between the values of both sides, or between their elements where values are lists.

    Raises:
        SystemExit: if ours lacks a value, if a value differs by more than 1e-5, relative where it is above 1, or if the
            norm of a gradient differs by more than a relative 1e-4.
    """
    largest = 0.0
    for name, expected in original.items():
        if name not in ours:
            raise SystemExit(f"The original gives '{name}' and ours does not: both do not do the same work.")
        pairs = zip(ours[name], expected, strict=True) if isinstance(expected, list) else [(ours[name], expected)]
        for value, other in pairs:
            is_norm = name.startswith("gradient ")
            bound = 1e-4 * abs(other) + 1e-6 if is_norm else 1e-5 * max(abs(other), 1)
            if not abs(value - other) <= bound:
                raise SystemExit(
                    f"{name} is {value!r} in ours and {other!r} in the original: both do not do the same work."
                )
            if not is_norm:
                largest = max(largest, abs(value - other))
    return largest


def seconds_row(title: str, original: list[float], ours: list[float], difference: float) -> str:
    """A line of the table: medians, and the ratios of consecutive runs."""
    ratios = [theirs / own for theirs, own in zip(original, ours, strict=True)]
    cells = [f"{statistics.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in (original, ours)]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {title} | {' | '.join(cells)} | {difference:.1e} |"


def memory_rows(original: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Lines of the table of a step's memory."""
    for name, side in (("original", original), ("ours", ours)):
        if side["peak"] <= side["before the steps"]:
            raise SystemExit(
                f"The peak of {name} was reached before the steps, so that their memory cannot be measured: "
                "increase PAIRS."
            )
    rows = [("peak", original["peak"], ours["peak"])]
    rows += [(name, original["held"][name], ours["held"][name]) for name in ours["held"]]
    rest = [side["peak"] - sum(side["held"].values()) for side in (original, ours)]
    rows.append(("activations: peak less these", *rest))
    rows.append(("of which libraries, imported", original["libraries"], ours["libraries"]))
    rows.append(("activations without libraries", rest[0] - original["libraries"], rest[1] - ours["libraries"]))
    return [f"| {name} | {a / 2**30:.3f} | {b / 2**30:.3f} | {b / a:.2f} |" for name, a, b in rows]


def measure(part: str, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Lines of the tables of times and of memory for one of the works."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.pt"
        ours = Side("ours", part, file, args)
        original = Side("original", part, file, args)
    if ours.ready["threads"] != original.ready["threads"]:
        raise SystemExit(
            f"The sides have different numbers of threads, {ours.ready} and {original.ready}: set --threads."
        )
    reference = ours.ask("values")
    difference = largest_difference(reference, original.ask("values"))
    if part != "step":
        runs = [(original.ask(number), ours.ask(number)) for number in range(args.repeats)]
        difference = max([difference, *(largest_difference(reference, theirs["values"]) for theirs, _ in runs)])
    else:
        original.ask(0), ours.ask(0)  # the first step allocates memory
        runs = [(original.ask(number), ours.ask(number)) for number in range(args.repeats)]
    memory = memory_rows(original.ask("memory"), ours.ask("memory")) if part == "step" else []
    original.close()
    ours.close()
    print(f"{TITLES[part]}: {args.repeats} runs of each side, {ours.ready}", file=sys.stderr)

    def row(title: str, pick: Any) -> str:
        return seconds_row(title, [pick(theirs) for theirs, _ in runs], [pick(own) for _, own in runs], difference)

    if part != "features":
        return [row(TITLES[part], lambda run: run["seconds"])], memory
    titles = {"images": f"features of {FEATURE_IMAGES} images", "texts": f"of {FEATURE_TEXTS} texts of {LENGTH} tokens"}
    return [row(title, lambda run, kind=kind: run["seconds"][kind]) for kind, title in titles.items()], memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", required=True, help="folder with the original's code")
    parser.add_argument("--packages", help="folder with its dependencies")
    parser.add_argument("--python", help="interpreter with its dependencies; by default this one")
    parser.add_argument("--only", default=",".join(TITLES), help=f"some of {','.join(TITLES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--shares", type=int, default=4, help="shares of the original's re-ranking, of which a run times one"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of each side; 0 for PyTorch's choice")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        answer_requests(args)
        return
    if not (Path(args.checkout) / "models" / "model_pretrain.py").is_file():
        parser.error(f"--checkout {args.checkout} has no models/model_pretrain.py: clone the original's code to it.")
    parts = args.only.split(",")
    if unknown := set(parts) - set(TITLES):
        parser.error(f"--only '{sorted(unknown)[0]}' is not a work: choose some of {', '.join(TITLES)}.")
    tables = [measure(part, args) for part in parts]
    print("| work | original, s | ours, s | times faster | largest difference |\n|---|---|---|---|---|")
    print("\n".join(line for times, _ in tables for line in times))
    if memory := [line for _, lines in tables for line in lines]:
        print(f"\n| memory, {TITLES['step']} | original, GiB | ours, GiB | share |\n|---|---|---|---|")
        print("\n".join(memory))


if __name__ == "__main__":
    main()
