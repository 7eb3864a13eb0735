"""The page of questions: the messages that it quotes are those of the package, and the curves start where it says."""

import ast
import math
import re

import pytest
import torch
from helpers import ROOT, training_batch

from tcl_hf import TCLConfig, TCLForPreTraining

PAGE = ROOT / "docs" / "faq.md"


def messages_of_package() -> list[str]:
    """The literal texts in the code of the package, with a mark where a value stands in them."""
    found = []
    for path in [*(ROOT / "tcl_hf").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def stands_in(quoted: str, message: str) -> bool:
    """Whether the pieces of a quotation, which … separates, stand in a message in this order."""
    place = 0
    for piece in filter(None, (piece.strip() for piece in quoted.split("…"))):
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def test_quoted_messages_are_messages_of_the_package():
    quotations = re.findall(r"“(.*?)”", " ".join(PAGE.read_text().split()))
    messages = messages_of_package()
    assert len(quotations) >= 25
    wrong = [quoted for quoted in quotations if not any(stands_in(quoted, message) for message in messages)]
    wrong.remove("quotation marks")  # the sentence that explains them
    assert not wrong, wrong


def test_the_curves_start_where_the_page_says():
    """With new weights, the losses are those of guessing among N + Q keys, N views, 16 (N - 1) regions, and V words."""
    pairs, queue, words = 32, 1024, 5000
    small = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    vision, text = small | {"image_size": 64}, small | {"fusion_layer": 2, "vocab_size": words}
    torch.manual_seed(0)
    config = TCLConfig(vision_config=vision, text_config=text, queue_size=queue)
    output = TCLForPreTraining(config).train()(**training_batch(pairs, 12, config=config), alpha=0.0)
    above = output.loss_cma.item() - math.log(pairs + queue)
    assert -0.2 < above < 2
    assert 0 < output.loss_imc.item() - math.log(pairs) < 1
    assert 0 < output.loss_lmi.item() - math.log(1 + 16 * (pairs - 1)) < 1
    assert 0.65 < output.loss_itm.item() < 0.95
    assert output.loss_mlm.item() == pytest.approx(math.log(words), abs=0.3)


def test_the_numbers_beside_the_formulas_are_right():
    page = PAGE.read_text()
    assert f"above ln N: {math.log(64):.1f} to {math.log(64) + 1:.1f} for 64 pairs" in page
    assert f"near ln V: {math.log(30522):.1f} for 30,522 words" in page
    lowest = math.log(1 + 16 * 63)
    assert f"{lowest:.1f} to {lowest + 1:.1f} for 64 pairs" in page
    assert round(math.log(65536 + 512)) == 11 and "11 to 13 for a queue of 65,536" in page
    # Two thirds of the pairs are wrong: the entropy of always answering with these shares.
    assert round(-(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3, 2) == 0.64


def test_the_versions_are_those_of_the_package():
    requirements = (ROOT / "setup.cfg").read_text()
    versions = re.findall(r"'((?:transformers|datasets)>=[^']+)'", PAGE.read_text())
    assert len(versions) == 2 and all(f"    {version}\n" in requirements for version in versions)
