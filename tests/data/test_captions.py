"""Captions are cut and cleaned before they become tokens."""

from helpers import png, tiny_processor, write_json

from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.pairs import load_pairs


def test_a_giant_caption_is_cut_before_anything_reads_it(pictures):
    giant = "dog " * 2_000_000
    dataset = load_pairs(write_json(pictures, [{"image": "0.png", "caption": giant}]))
    assert dataset[0]["captions"] == [giant[:10_000]]
    processor = tiny_processor()
    collator = TCLPreTrainingCollator(processor)
    assert collator._caption({"captions": [giant]}) == " ".join(["dog"] * 30)
    processor.clean_text = False
    assert collator._caption({"captions": [giant]}) == giant[:10_000]  # The tokenizer gets no more than this.


def test_captions_are_cleaned_unless_the_processor_does_not():
    record = {"image": {"bytes": png(0)}, "captions": ["A Dog!!"]}
    processor = tiny_processor()
    lengths = []
    for clean in (True, False):
        processor.clean_text = clean
        lengths.append(TCLPreTrainingCollator(processor)([record])["input_ids"].shape[1])
    assert lengths == [3, 5]
