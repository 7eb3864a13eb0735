"""Time re-ranked retrieval against two plain loops, on the same model and data: `python benchmarks/reranking.py`.

The plain loops (`plain.plain_rerank`) are those of the original. They score k texts for each image, and k images for
each text; keys and values are projected again for every pair, and all texts are padded to the longest. The scores must
agree. Only scoring is timed, without encoding.

Without `--model` and `--data`, a random model of the small size scores random images and texts.
"""

import argparse
import time

import torch
from plain import PlainTCL, plain_rerank

from tcl_hf import TCLConfig, TCLForImageTextRetrieval
from tcl_hf.data.pairs import load_pairs
from tcl_hf.evaluation.retrieval import NOT_SCORED, EncodedSamples, candidates, encode_samples, matching_scores
from tcl_hf.models.processing_tcl import TCLProcessor


def random_pairs(images: int, texts: int) -> tuple[TCLForImageTextRetrieval, EncodedSamples]:
    """A model of width 384 with three fusion layers, and random states in place of those of its encoders."""
    torch.manual_seed(0)
    config = TCLConfig(
        vision_config={"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 1536},
        text_config={
            "hidden_size": 384,
            "num_hidden_layers": 9,
            "fusion_layer": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
        use_momentum_teacher=False,
    )
    model = TCLForImageTextRetrieval(config).eval()
    lengths = torch.randint(8, 31, (texts,))
    mask = (torch.arange(30) < lengths[:, None]).long()
    unit = torch.nn.functional.normalize
    return model, EncodedSamples(
        image_rows=list(range(images)),
        image_states=torch.randn(images, 65, 384),
        text_states=torch.randn(texts, 30, 384),
        attention_mask=mask,
        image_embeds=unit(torch.randn(images, 64), dim=-1),
        text_embeds=unit(torch.randn(texts, 64), dim=-1),
        image_of_text=torch.arange(texts) % images,
        texts=[],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of a TCL model")
    parser.add_argument("--data", help="source of pairs")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=5000, help="of a random model; real data has its own")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--part", type=float, default=0.02, help="share of the plain loops that is run")
    args = parser.parse_args()
    if args.model:
        model = TCLForImageTextRetrieval.from_pretrained(args.model, use_momentum_teacher=False).eval()
        records = list(load_pairs(args.data, args.split).take(args.images))
        start = time.perf_counter()
        pairs = encode_samples(model, TCLProcessor.from_pretrained(args.model), records, progress=True)
        print(f"encoding: {time.perf_counter() - start:.1f} s")
    else:
        model, pairs = random_pairs(args.images, args.texts)
    num_images, num_texts = len(pairs.image_embeds), len(pairs.text_embeds)

    start = time.perf_counter()
    ours = matching_scores(model, pairs, args.k, progress=True)
    seconds = time.perf_counter() - start
    scored = int((ours != NOT_SCORED).sum())
    images = range(0, num_images, max(round(1 / args.part), 1))
    texts = range(0, num_texts, max(round(1 / args.part), 1))
    plain = PlainTCL(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)  # ours may have no teacher
    start = time.perf_counter()
    loops = plain_rerank(plain, pairs, args.k, images, texts)
    plain_seconds = (time.perf_counter() - start) * (num_images + num_texts) / (len(images) + len(texts))
    computed = args.k * (len(images) + len(texts))
    difference = max((scores - ours)[scores != NOT_SCORED].abs().max().item() for scores in loops)

    all_pairs = args.k * (num_images + num_texts)
    chosen = candidates(pairs.similarity(), args.k)
    assert scored == sum(len(row) for row in chosen)
    print(f"{num_images} images x {num_texts} texts, k = {args.k}, {torch.get_num_threads()} threads")
    print("| | pairs | seconds | pairs / s |\n|---|---|---|---|")
    print(f"| ours | {scored} | {seconds:.1f} | {scored / seconds:.0f} |")
    print(
        f"| two loops (from {computed} pairs) | {all_pairs} | {plain_seconds:.1f} | {all_pairs / plain_seconds:.0f} |"
    )
    print(f"| ratio | {all_pairs / scored:.2f} | {plain_seconds / seconds:.2f} | |")
    print(f"largest difference of a score: {difference:.1e}")


if __name__ == "__main__":
    main()
