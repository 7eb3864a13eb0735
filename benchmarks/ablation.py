"""The gain from each of our optimizations: a pre-training step with one of them off: `python benchmarks/ablation.py`.

One process has one model and one batch. The optimizations take turns, round after round, and each step with one of them
off is timed right after a step with all of them on. Both compute the same numbers up to rounding (tests compare them),
except for random draws. Options that change the result come last: bf16, patch dropout and, with `--compile`, the
compiler, whose first steps do not count.
"""

import argparse
import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from original import replaced
from plain import draw_negatives, plain_lmi_loss
from pretrain_step import SIZES, random_batch
from torch import Tensor
from tqdm.auto import tqdm

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.models import attention, encoders, modeling_tcl
from tcl_hf.models.momentum import MomentumTeacher
from tcl_hf.training.allocation import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from tcl_hf.training.optimization import parameter_groups

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


class Step:
    """A training step of ours, with its model, batch and optimizers."""

    def __init__(self, config: TCLConfig, batch: dict[str, Tensor]):
        self.model = TCLForPreTraining(config).train()
        self.batch = batch
        self.fused, self.loop = (
            torch.optim.AdamW(parameter_groups(self.model, 0.02), lr=1e-5, **how)
            for how in ({"fused": True}, {"foreach": False})
        )
        self.optimizer = self.fused
        self.forward: Callable[..., Any] = self.model
        self.precision: AbstractContextManager = contextlib.nullcontext()

    def run(self) -> float:
        """Take a step, and return its seconds."""
        start = time.perf_counter()
        self.model.update_teacher()
        with self.precision:
            loss = self.forward(**self.batch, alpha=0.4).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


# Optimizations that are switched off within a block


@contextlib.contextmanager
def eager_attention(step: Step) -> Iterator[None]:
    step.model.set_attn_implementation("eager")
    yield
    step.model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def pytorch_s_attention_with_dropout(step: Step) -> Iterator[None]:
    """Use PyTorch's plain kernel for attention with dropout on CPUs, where ours would run."""
    sdpa = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    with replaced(attention, "eager_attention_forward", sdpa):
        yield


@contextlib.contextmanager
def projected_for_every_row(step: Step) -> Iterator[None]:
    """Repeat the image states for every row of texts, and project each to keys and values."""
    fuse = encoders.TCLTextModel.fuse

    def fuse_rows(self, states: Tensor, mask: Tensor, images: Any, index: Tensor | None = None, **options: Any) -> Any:
        rows = torch.arange(len(images)).repeat_interleave(len(states) // len(images)) if index is None else index
        return fuse(self, states, mask, self.project_images(images[rows]), **options)

    def fuse_states(
        self, states: Tensor, mask: Tensor, images: Tensor, index: Tensor | None = None, **options: Any
    ) -> Any:
        return self.text_model.fuse(states, mask, images, index, **options)

    with replaced(encoders.TCLTextModel, "fuse", fuse_rows), replaced(modeling_tcl.TCLModel, "fuse", fuse_states):
        yield


@contextlib.contextmanager
def whole_last_layer(step: Step) -> Iterator[None]:
    """Compute every token of the last fusion layer, and select some afterwards."""
    fuse = encoders.TCLTextModel.fuse

    def all_tokens(
        self, *args: Any, token_index: Tensor | None = None, text_index: Tensor | None = None, **options: Any
    ) -> Any:
        output = fuse(self, *args, text_index=text_index, **options)
        if token_index is not None:
            token_index = token_index if text_index is None else token_index[text_index]
            output.last_hidden_state = encoders.select_tokens(output.last_hidden_state, token_index)
        return output

    with replaced(encoders.TCLTextModel, "fuse", all_tokens):
        yield


@contextlib.contextmanager
def texts_for_every_row(step: Step) -> Iterator[None]:
    """Compute the self-attention of a text anew for each image that it meets."""
    fuse = encoders.TCLTextModel.fuse

    def selected(
        self,
        text_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        token_index: Tensor | None = None,
        text_index: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if text_index is not None:
            text_states, attention_mask, token_index = (
                None if x is None else x[text_index] for x in (text_states, attention_mask, token_index)
            )
        return fuse(self, text_states, attention_mask, *args, token_index=token_index, **options)

    with replaced(encoders.TCLTextModel, "fuse", selected):
        yield


@contextlib.contextmanager
def all_words_predicted(step: Step) -> Iterator[None]:
    """Compute the logits of every token, for which the last layer computes every token too."""
    positions = step.batch.pop("mlm_positions")
    yield
    step.batch["mlm_positions"] = positions


def textbook_lmi(step: Step) -> AbstractContextManager:
    return replaced(modeling_tcl, "lmi_loss", plain_lmi_loss)


def teacher_by_tensor(step: Step) -> AbstractContextManager:
    def update(self: MomentumTeacher, student: torch.nn.Module, momentum: float) -> None:
        with torch.no_grad():
            for parameter, target in zip(*self.parameters_and_targets(student), strict=True):
                parameter.data = parameter.data * momentum + target.data * (1 - momentum)

    return replaced(MomentumTeacher, "update", update)


def negatives_in_a_loop(step: Step) -> AbstractContextManager:
    def loop(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
        return draw_negatives(logits, excluded), ~excluded.all(-1)

    return replaced(modeling_tcl, "sample_hard_negatives", loop)


@contextlib.contextmanager
def adamw_in_a_loop(step: Step) -> Iterator[None]:
    step.optimizer = step.loop
    yield
    step.optimizer = step.fused


@contextlib.contextmanager
def memory_given_back(step: Step) -> Iterator[None]:
    """Set glibc as it sets itself once large blocks were freed: it keeps blocks up to 32 MiB, and 64 MiB at the end."""
    if keep_freed_memory():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
    yield
    keep_freed_memory()


OFF: dict[str, Callable[[Step], AbstractContextManager]] = {
    "fused attention kernel (eager in its place)": eager_attention,
    "own attention kernel where there is dropout": pytorch_s_attention_with_dropout,
    "keys and values once for an image": projected_for_every_row,
    "last layer for used tokens alone": whole_last_layer,
    "self-attention of a text once for its images": texts_for_every_row,
    "masked words alone predicted": all_words_predicted,
    "LMI by one logsumexp": textbook_lmi,
    "teacher moved in place, all tensors at once": teacher_by_tensor,
    "negatives without a loop": negatives_in_a_loop,
    "fused AdamW": adamw_in_a_loop,
    "freed memory kept": memory_given_back,
}


# Options that change the result


@contextlib.contextmanager
def bf16(step: Step) -> Iterator[None]:
    step.precision = torch.autocast("cpu", torch.bfloat16)
    yield
    step.precision = contextlib.nullcontext()


@contextlib.contextmanager
def patch_dropout(share: float, step: Step) -> Iterator[None]:
    step.model.config.patch_dropout = share
    yield
    step.model.config.patch_dropout = 0.0


@contextlib.contextmanager
def compiled(step: Step) -> Iterator[None]:
    if not hasattr(step, "compiled"):
        step.compiled = torch.compile(step.model.forward)  # type: ignore[attr-defined]
    step.forward = step.compiled  # type: ignore[attr-defined]
    yield
    step.forward = step.model


OPT_IN: dict[str, Callable[[Step], AbstractContextManager]] = {
    "bf16 by autocast": bf16,
    "half of the patches dropped": partial(patch_dropout, 0.5),
    "three quarters of the patches dropped": partial(patch_dropout, 0.75),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=25, help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="only those whose names contain one of these words")
    parser.add_argument(
        "--compile", action="store_true", help="also time the compiled forward; compiling takes minutes"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()  # as `train` does
    config = TCLConfig(**SIZES[args.size])
    step = Step(config, random_batch(config, args.pairs, args.length))
    ways = OFF | OPT_IN | ({"compiled": compiled} if args.compile else {})
    if args.only:
        ways = {name: way for name, way in ways.items() if any(word in name for word in args.only)}
    step.run()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in tqdm(range(args.repeats + 1), desc="rounds"):
        for name, way in ways.items():
            whole = step.run()
            with way(step):
                other = step.run()
            if number:  # the first round allocates
                seconds[name].append((whole, other))
    every = [whole for values in seconds.values() for whole, _ in values]
    print(f"{args.size}, {args.pairs} pairs of {args.length} tokens, {torch.get_num_threads()} threads, float32")
    print(f"all on: {statistics.median(every):.3f} s ({min(every):.3f} to {max(every):.3f})\n")
    for title, chosen in (("off", OFF), ("on, which changes the result", ways.keys() - OFF.keys())):
        print(f"| {title} | s | ratio to the step with all on (least to most) |\n|---|---:|---|")
        for name in ways:
            if name in chosen:
                ratios = [other / whole for whole, other in seconds[name]]
                spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                print(f"| {name} | {statistics.median(other for _, other in seconds[name]):.3f} | {spread} |")
        print()


if __name__ == "__main__":
    main()
