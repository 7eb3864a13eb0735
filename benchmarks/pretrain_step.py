"""Time a pre-training step by parts: `python benchmarks/pretrain_step.py [--size base] [--pairs 4] [--steps 5]`.

Prints seconds of the teacher's update, forward, backward and optimizer, pairs per second, peak memory, and the share
of the machine's own matrix-product speed, measured in the same run between the steps.
"""

import argparse
import resource
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.collators import mask_tokens, masked_positions
from tcl_hf.training import parameter_groups

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
    """Random images, and texts of the given length of which 15 % is masked."""
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


def matrix_speed(size: int = 2048) -> float:
    """Operations per second of a square float32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    start = time.perf_counter()
    a @ b
    return 2 * size**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=25, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = TCLForPreTraining(TCLConfig(**SIZES[args.size])).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-5, fused=True)
    batch = random_batch(model.config, args.pairs, args.length)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step() -> dict[str, float]:
        times, clock = {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            times[name], clock = now - clock, now

        model.update_teacher()
        lap("teacher update")
        loss = model(**batch, alpha=0.4).loss
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")
        return times

    step()  # the first one allocates
    matrix_speed()
    laps, speeds = [], []
    for _ in range(args.steps):
        speeds.append(max(matrix_speed() for _ in range(3)))
        laps.append(step())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    unit = 2**20 if sys.platform == "linux" else 2**30  # kilobytes, or bytes on macOS

    totals = [sum(lap.values()) for lap in laps]
    median, speed = statistics.median(totals), statistics.median(speeds)
    print(f"{args.size}, {args.pairs} pairs of {args.length} tokens, {torch.get_num_threads()} threads, float32")
    print("| part | median s | min | max | share |\n|---|---|---|---|---|")
    for name in laps[0]:
        values = [lap[name] for lap in laps]
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3f} | {min(values):.3f} | {max(values):.3f} | {middle / median:.0%} |")
    print(f"| step | {median:.3f} | {min(totals):.3f} | {max(totals):.3f} | |")
    print(f"pairs per second: {args.pairs / median:.2f}")
    print(f"peak memory: {peak / unit:.2f} GiB ({held / unit:.2f} GiB before the first step)")
    print(
        f"matrix products: {operations / 1e9:.0f} GFLOP a step, {operations / median / 1e9:.0f} GFLOP/s, "
        f"{operations / median / speed:.0%} of this machine's {speed / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
