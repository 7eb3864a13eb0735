"""Memory of a long stream, which should not grow: `python benchmarks/stream_memory.py`.

Small JPEGs with captions are written into tars in a temporary folder and read through the loader that training uses,
with decoding and augmentation; nothing is trained. Every 5,000 samples (`--every`) it prints the memory of this process
and its workers: their resident sets (RSS), in which shared pages count several times, and their proportional sets
(PSS), in which every page counts once.
"""

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from tqdm.auto import trange

from tcl_hf.data.augmentation import TCLAugmentation
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import load_pairs
from tcl_hf.data.skipped import SkippedSamples
from tcl_hf.data.streams import StreamLoader
from tcl_hf.data.tokenizer import train_tokenizer
from tcl_hf.models.image_processing_tcl import TCLImageProcessorPil
from tcl_hf.models.processing_tcl import TCLProcessor


def write_tars(folder: Path, samples: int, per_tar: int, side: int) -> None:
    """Write tars of random smooth pictures with captions, as img2dataset does."""
    rng = np.random.default_rng(0)
    for first in trange(0, samples, per_tar, desc="Writing tars"):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, samples)):
                file = io.BytesIO()
                pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((side, side)).save(file, "JPEG")
                caption = f"a picture of {rng.integers(1000)} things".encode()
                for kind, content in (("jpg", file.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def memory() -> tuple[float, float]:
    """RSS and PSS of this process and its children, in MB."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    infos = [process.memory_full_info() for process in processes]
    return sum(info.rss for info in infos) / 1e6, sum(info.pss for info in infos) / 1e6


def main() -> None:
    """Write the data, read it, and print memory on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--per_tar", type=int, default=1000)
    parser.add_argument("--side", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--every", type=int, default=5000, help="samples between two lines of output")
    args = parser.parse_args()

    processor = TCLProcessor(TCLImageProcessorPil(size={"height": 32, "width": 32}), train_tokenizer(["a picture"]))
    pixels = processor.image_processor
    augmentation = TCLAugmentation(32, pixels.image_mean, pixels.image_std, num_operations=0, color_jitter=False)
    collator = TCLPreTrainingCollator(processor, augmentation).for_run(SkippedSamples())
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), args.samples, args.per_tar, args.side)
        dataset = load_pairs(folder, streaming=True)
        loader = StreamLoader(dataset, collator, args.batch_size, seed=0, num_workers=args.workers)
        print(f"{'samples':>8} {'RSS MB':>8} {'PSS MB':>8} {'samples/s':>10}")
        seen, due, start = 0, 0, time.perf_counter()
        for batch in loader:
            seen += len(batch["input_ids"]) if batch else 0
            if seen >= due:
                rss, pss = memory()
                print(f"{seen:>8} {rss:>8.0f} {pss:>8.0f} {seen / (time.perf_counter() - start):>10.0f}", flush=True)
                due += args.every
        print(f"{seen} of {args.samples} samples read")


if __name__ == "__main__":
    main()
