"""Time a pre-training step by parts: `python benchmarks/pretrain_step.py [--size base] [--pairs 4] [--steps 5]`.

It prints the seconds of the teacher's update, forward, backward and optimizer, pairs per second, peak memory, and the
step's speed as a share of the device's speed of matrix products, which is measured between the steps. On a GPU, use
`--device cuda --precision bf16 --pairs 64`; `--plain` times the plain reference.
"""

import argparse
import resource
import statistics
import sys
import time

import torch
from plain import PlainTCL
from torch import nn

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.data.collators import mask_tokens, masked_positions
from tcl_hf.training.allocation import keep_freed_memory
from tcl_hf.training.operations import run_step
from tcl_hf.training.optimization import parameter_groups

SIZES = {
    "base": {},  # ViT-B/16 at 256 pixels, BERT-base: the paper's
    "small": {
        "vision_config": {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "patch_size": 14,
            "image_size": 112,
        },
        "text_config": {
            "hidden_size": 384,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "num_hidden_layers": 9,
        },
    },
}


def random_batch(config: TCLConfig, num_pairs: int, length: int) -> dict[str, torch.Tensor]:
    """Random images and texts of a given length, with a share of the tokens masked."""
    size, vocab = config.vision_config.image_size, config.text_config.vocab_size
    input_ids = torch.randint(1000, vocab, (num_pairs, length))
    maskable = torch.ones(num_pairs, length, dtype=torch.bool)
    maskable[:, 0] = False
    masked, labels = mask_tokens(
        input_ids,
        maskable,
        config.mlm_probability,
        103,
        torch.rand(num_pairs, length, 2),
        torch.randint(vocab, (num_pairs, length)),
    )
    return {
        "pixel_values": torch.randn(num_pairs, 3, size, size),
        "pixel_values_augmented": torch.randn(num_pairs, 3, size, size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "mlm_positions": masked_positions(labels),
    }


def finish(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_speed(size: int = 2048, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a square matrix product, written to memory that is already allocated."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    finish(device)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b, out=out)
    finish(device)
    return 4 * 2 * size**3 / (time.perf_counter() - start)


def peak_memory(device: str) -> float:
    """The peak memory of this process, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**20 if sys.platform == "linux" else 2**30  # kilobytes, or bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=25, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="bf16 by autocast")
    parser.add_argument("--compile", action="store_true", help="compile the forward")
    parser.add_argument("--patch_dropout", type=float, default=0.0, help="share of the patches that the student drops")
    parser.add_argument("--plain", action="store_true", help="the plain reference in place of ours")
    args = parser.parse_args()
    if args.plain and args.patch_dropout:
        parser.error("--patch_dropout: the plain reference reads all patches, so leave out this option or --plain")
    return args


def report(
    args: argparse.Namespace, laps: list[dict[str, float]], speeds: list[float], flops: float, held: float
) -> None:
    """Print the tables of a run.

    Args:
        laps: seconds of each part, for each step.
        speeds: operations per second of matrix products, between the steps.
        flops: operations of our step.
        held: GiB in use before the first step.
    """
    totals = [sum(lap.values()) for lap in laps]
    median, speed = statistics.median(totals), statistics.median(speeds)
    who = "plain reference" if args.plain else "ours"
    where = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{who}, {args.size}, {args.pairs} pairs of {args.length} tokens, {where}, {args.precision}"
        f"{', compiled' * args.compile}"
    )
    print("| part | median s | min | max | share |\n|---|---|---|---|---|")
    for name in laps[0]:
        values = [lap[name] for lap in laps]
        middle = statistics.median(values)
        print(f"| {name} | {middle:.4f} | {min(values):.4f} | {max(values):.4f} | {middle / median:.0%} |")
    print(f"| step | {median:.4f} | {min(totals):.4f} | {max(totals):.4f} | |")
    print(f"pairs per second: {args.pairs / median:.2f}")
    print(f"peak memory: {peak_memory(args.device):.2f} GiB ({held:.2f} GiB before the first step)")
    print(
        f"matrix products of our step: {flops / 1e9:.0f} GFLOP, {flops / median / 1e9:.0f} GFLOP/s, "
        f"{flops / median / speed:.0%} of this device's {speed / 1e9:.0f} GFLOP/s"
    )


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and not args.plain:
        keep_freed_memory()  # as `train` does
    torch.manual_seed(0)
    fields = dict(SIZES[args.size])
    config = TCLConfig(**fields, patch_dropout=args.patch_dropout)
    model: nn.Module = (PlainTCL if args.plain else TCLForPreTraining)(config).train().to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-5, fused=None if args.plain else True)
    batch = {name: value.to(args.device) for name, value in random_batch(config, args.pairs, args.length).items()}
    forward = torch.compile(model) if args.compile else model
    alpha = torch.tensor(0.4, device=args.device) if args.compile else 0.4
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    held = peak_memory(args.device)

    def step() -> dict[str, float]:
        times, clock = {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            finish(args.device)
            now = time.perf_counter()
            times[name], clock = now - clock, now

        model.update_teacher()
        lap("teacher update")
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = forward(**batch, alpha=alpha).loss
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        return times

    step(), step()  # the first step allocates memory
    laps, speeds = [], []
    for _ in range(args.steps):
        speeds.append(matrix_speed(2048 if args.device == "cpu" else 8192, args.device, dtype))
        laps.append(step())
    masked = batch["mlm_positions"].shape[1]
    flops = run_step(config, args.pairs, args.length, num_masked=masked).flops
    report(args, laps, speeds, flops, held)


if __name__ == "__main__":
    main()
