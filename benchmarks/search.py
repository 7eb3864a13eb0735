"""Time the index of pictures: `python benchmarks/search.py [--pictures 10000] [--vectors 1000000]`.

Pictures are OpenMoji's at several sizes and rotations. Indexing is compared with reading, decoding and encoding alone,
which the same threads and the same batches do. Then copies of the files fill the folder up to `--files`; their content
is known, so that they are not encoded. The folder is synchronised again, and texts are searched with and without
re-ranking.

`--vectors` fills another table with random unit vectors. Near each of the queries are twenty more, with cosines drawn
between `--near`. It measures recall@10 of the approximate search against the exact one, its latency, and the memory.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tcl_hf.data.embedded.openmoji import load_openmoji
from tcl_hf.data.images import open_image
from tcl_hf.search import ImageIndex, SearchModel
from tcl_hf.search.encoding import AHEAD, in_threads
from tcl_hf.search.ranking import NUM_READERS, default_model, read_rgb
from tcl_hf.search.storage import approximate, make_vector_index

BATCH = 32
PLANTED = 20
SIZES = (160, 240, 320, 480)


def write_pictures(folder: Path, number: int) -> list[str]:
    """Write pictures of OpenMoji, each at another size and rotation; return their names for queries."""
    records = load_openmoji("train")
    names = []
    for place in range(number):
        record = records[place % len(records)]
        turn = place // len(records)
        image = open_image(record["image"]).convert("RGB")
        image = image.resize((SIZES[(place + turn) % len(SIZES)],) * 2).rotate(37 * turn, fillcolor="white")
        image.save(folder / f"{place:06d}.jpg", quality=92)
        names.append(record["captions"][0])
    return names


def seconds(work: Callable[[], Any]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_and_encode(folder: Path, model: SearchModel) -> None:
    """Read, decode and encode all pictures, and keep nothing."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(NUM_READERS) as threads:
        pixels = in_threads(lambda path: model.pixel_values(read_rgb(path.read_bytes())), paths, threads, AHEAD * BATCH)
        batch = []
        for number, one in enumerate(pixels, 1):
            batch.append(one)
            if len(batch) == BATCH or number == len(paths):
                model.encode_images(torch.stack(batch))
                batch = []


def percentiles(milliseconds: list[float]) -> str:
    """The median and the 95th percentile in words."""
    return f"p50 {np.percentile(milliseconds, 50):.0f} ms, p95 {np.percentile(milliseconds, 95):.0f} ms"


def time_pictures(place: Path, args: argparse.Namespace) -> None:
    """Indexing, indexing again, and searching."""
    folder = place / "pictures"
    folder.mkdir()
    model = SearchModel(args.model or default_model())
    texts = write_pictures(folder, args.pictures)
    alone, indexing = [], []
    for turn in range(args.rounds):
        alone.append(seconds(lambda: read_and_encode(folder, model)))
        index = ImageIndex.create(place / f"index-{turn}", model)
        indexing.append(seconds(lambda index=index: index.sync(folder, batch_size=BATCH, progress=False)))
    ratio = min(indexing) / min(alone)
    print(f"{args.pictures} pictures: indexing takes {ratio:.2f} of reading and encoding alone ({min(alone):.0f} s)")
    files = sorted(folder.iterdir())
    for number in range(args.files - args.pictures):
        shutil.copy(files[number % len(files)], folder / f"copy-{number:06d}.jpg")
    index.sync(folder, progress=False)
    print(f"{len(index)} pictures, nothing changed: {seconds(lambda: index.sync(folder, progress=False)):.1f} s")
    for rerank in (0, 32):
        index.search(texts[0], rerank=rerank)
        taken = [1000 * seconds(lambda t=text, r=rerank: index.search(t, rerank=r)) for text in texts[: args.queries]]
        print(f"search of {len(index)} pictures, k = 10, re-ranking {rerank}: {percentiles(taken)}")
    stats = index.stats()
    print(f"{stats.bytes / stats.rows / 1000:.1f} kB on disk for a picture, states included")


def time_vectors(place: Path, args: argparse.Namespace) -> None:
    """Recall, latency and memory of the approximate search."""
    import lancedb

    random = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        vectors = random.normal(size=shape).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    queries = unit(args.queries, args.dim)
    away = unit(args.queries, PLANTED, args.dim)
    away -= (away @ queries[..., None]) * queries[:, None]
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    cosines = random.uniform(*args.near, size=(args.queries, PLANTED, 1)).astype(np.float32)
    planted = (cosines * queries[:, None] + np.sqrt(1 - cosines**2) * away).reshape(-1, args.dim)
    schema = pa.schema([("number", pa.int64()), ("vector", pa.list_(pa.float32(), args.dim))])
    table = lancedb.connect(place / "vectors").create_table("vectors", schema=schema)
    best = np.full((args.queries, 10), -np.inf, np.float32)
    exact = np.zeros((args.queries, 10), np.int64)
    for start in range(0, args.vectors, 50_000):
        part = unit(min(50_000, args.vectors - start), args.dim)
        if start == 0:
            part[: len(planted)] = planted
        numbers = np.arange(start, start + len(part))
        vectors = pa.FixedSizeListArray.from_arrays(part.ravel(), args.dim)
        table.add(pa.table({"number": numbers, "vector": vectors}, schema=schema))
        scores = np.concatenate([best, queries @ part.T], axis=1)
        order = np.argsort(-scores, axis=1)[:, :10]
        exact = np.take_along_axis(np.concatenate([exact, np.tile(numbers, (args.queries, 1))], axis=1), order, axis=1)
        best = np.take_along_axis(scores, order, axis=1)
    built = seconds(lambda: make_vector_index(table, args.vectors))
    found, taken = [], []
    for query in [queries[0], *queries]:  # The first one opens the index.
        start = time.perf_counter()
        search = approximate(table.search(query).distance_type("cosine")).select(["number", "_distance"]).limit(10)
        found.append([row["number"] for row in search.to_list()])
        taken.append(1000 * (time.perf_counter() - start))
    recall = np.mean([len({*row} & {*right}) / 10 for row, right in zip(found[1:], exact.tolist(), strict=True)])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{args.vectors} vectors of {args.dim} dimensions, neighbours at cosines of {args.near[0]} to {args.near[1]}:"
    )
    print(f"recall@10 {recall:.3f}, {percentiles(taken[1:])}, memory of the process {memory:.2f} GB")
    print(f"the approximate index took {built:.0f} s to make")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint; the newest of the demo if not given")
    parser.add_argument("--pictures", type=int, default=10_000, help="different pictures; 0 for none")
    parser.add_argument("--files", type=int, default=10_000, help="files, copies included")
    parser.add_argument("--rounds", type=int, default=1, help="times that indexing is measured; the fastest counts")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="random vectors; 0 for none")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--near", type=float, nargs=2, default=(0.3, 0.7))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if args.pictures:
            time_pictures(Path(place), args)
        if args.vectors:
            time_vectors(Path(place), args)


if __name__ == "__main__":
    main()
