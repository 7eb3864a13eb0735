"""Closed forms of a step's operations against PyTorch's counter, by part and in total; bytes and sums by hand."""

import bisect
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers import small_patches, tiny_config
from pretrain_step import SIZES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tcl_hf import TCLConfig
from tcl_hf.training.operations import FusedRows, Work, attention, fusion_encoder, operations, product, updates
from tcl_hf.training.planning import PlanArguments, count_parameters, describe_operations, empty_model

SMALL = SIZES["small"]
ALBEF = {"cma_weight": 1, "imc_weight": 0, "lmi_weight": 0}
CMA = ALBEF | {"itm_weight": 0, "mlm_weight": 0}
ALONE = {f"{name}_weight": 0 for name in ("cma", "imc", "lmi", "itm", "mlm")}
NO_FUSION = {"text_config": {"num_hidden_layers": 2, "fusion_layer": 2}}


class CountByPart(TorchDispatchMode):
    """What the counter counts in each part of a step: forward by where it runs, backward by whose forward it undoes.

    Autograd numbers its nodes in the order of the forward. So what runs backward belongs to the part in which the
    node of its number was made.
    """

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self.counter = counter
        self.forward, self.backward = Counter(), Counter()
        self.part = "elsewhere"
        self.starts = [0]  # numbers from which on a part was at work
        self.names = [self.part]

    @contextmanager
    def within(self, part: str):
        before, self.part = self.part, part
        self._mark()
        yield
        self.part = before
        self._mark()

    def calls(self, owner, method: str, part: str, monkeypatch) -> None:
        """Everything that runs in a method, or function of a module, belongs to a part."""
        call = getattr(owner, method)

        def counted(*args, **kwargs):
            with self.within(part):
                return call(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    def _mark(self) -> None:
        self.starts.append(torch.autograd._get_sequence_nr())
        self.names.append(self.part)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = self.counter.get_total_flops()
        result = function(*args, **(kwargs or {}))
        flops = self.counter.get_total_flops() - before
        node = torch._C._current_autograd_node()
        if flops and node is None:
            self.forward[self.part] += flops
        elif flops:
            part = self.names[bisect.bisect_right(self.starts, node._sequence_nr()) - 1]
            self.backward[part] += flops
        return result


def count_step(config: TCLConfig, pairs: int, tokens: int, masked: int, monkeypatch) -> tuple[dict, int]:
    """Operations of a real step by part (forward, backward), and in total; on tensors without content."""
    model = empty_model(config).train()
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    size = config.vision_config.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        ids = torch.zeros(pairs, tokens, dtype=torch.long)
        batch = {
            "pixel_values": torch.empty(pairs, 3, size, size),
            "pixel_values_augmented": torch.empty(pairs, 3, size, size),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mlm_input_ids": ids.clone(),
            "mlm_labels": ids.clone(),
            "mlm_positions": torch.zeros(pairs, masked, dtype=torch.long),
            "image_ids": torch.zeros(pairs, dtype=torch.long),
        }
        with FlopCounterMode(display=False) as counter, CountByPart(counter) as by_part:
            for name, owner in (("student", model), ("teacher", model.teacher)):
                by_part.calls(owner.tcl, "encode_image", f"image encoder, {name}", monkeypatch)
                by_part.calls(owner.tcl, "encode_text", f"text encoder, {name}", monkeypatch)
                by_part.calls(owner.tcl.text_model, "project_images", f"keys and values of images, {name}", monkeypatch)
                by_part.calls(owner.tcl.text_model, "fuse", f"fusion encoder, {name}", monkeypatch)
                by_part.calls(owner.lm_head, "forward", f"language-model head, {name}", monkeypatch)
                by_part.calls(owner.tcl, "image_features", f"projections, {name}", monkeypatch)
                by_part.calls(owner.tcl, "text_features", f"projections, {name}", monkeypatch)
            by_part.calls(model.itm_head, "forward", "matching head", monkeypatch)
            by_part.calls(model, "_hard_negatives", "similarities in the batch", monkeypatch)
            for name, part in (("cma_loss", "CMA"), ("imc_loss", "IMC"), ("lmi_loss", "LMI")):
                by_part.calls(__import__("tcl_hf.models.modeling_tcl").modeling_tcl, name, part, monkeypatch)
            model(**batch).loss.backward()
    forward, backward = by_part.forward, by_part.backward
    forward["similarities in the batch"] += forward.pop("elsewhere", 0)  # the logits that are returned
    counted = {part: (flops, backward[part]) for part, flops in forward.items() if flops}
    assert set(backward) <= set(counted)
    return counted, counter.get_total_flops()


CASES = {
    "tiny": (tiny_config(), 4, 7, 3),
    "one pair": (small_patches(), 1, 5, 1),
    "short texts": (small_patches(), 3, 2, 1),
    "nothing masked": (small_patches(), 3, 6, 0),
    "small": (TCLConfig(**SMALL, queue_size=1000), 8, 25, 8),
    "base": (TCLConfig(), 4, 25, 8),
    "no queue": (small_patches(queue_size=0), 2, 30, 5),
    "larger images": (small_patches(vision_config={"image_size": 64}, text_config={"fusion_layer": 1}), 2, 11, 2),
    "ALBEF": (small_patches(**ALBEF), 4, 7, 3),
    "CMA": (small_patches(**CMA), 4, 7, 3),
    "CMA without fusion layers": (small_patches(**CMA, **NO_FUSION), 4, 7, 3),
    "IMC": (small_patches(**ALONE | {"imc_weight": 1}), 4, 7, 3),
    "LMI": (small_patches(**ALONE | {"lmi_weight": 1}), 4, 7, 3),
    "ITM": (small_patches(**ALONE | {"itm_weight": 1}), 4, 7, 3),
    "MLM": (small_patches(**ALONE | {"mlm_weight": 1}), 4, 7, 3),
    "MLM without teacher": (small_patches(**ALONE | {"mlm_weight": 1}, alpha=0), 4, 7, 3),
    "no soft targets": (small_patches(alpha=0), 4, 7, 3),
    "no text encoder": (small_patches(text_config={"fusion_layer": 0}), 4, 7, 3),
    "shared keys and values": (small_patches(text_config={"images_per_text": 2}), 4, 7, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_pytorch_counts(case, monkeypatch):
    config, pairs, tokens, masked = CASES[case]
    counted, total = count_step(config, pairs, tokens, masked, monkeypatch)
    parts = operations(config, pairs, tokens, masked)
    assert {part: (work.forward, work.backward) for part, work in parts.items()} == counted
    assert sum(work.flops for work in parts.values()) == total


def test_a_product_moves_its_three_matrices_once_for_itself_and_once_for_each_gradient():
    moved = 4 * (5 * 7 + 7 * 11 + 5 * 11)
    assert product(5, 7, 11, gradients=0) == Work(2 * 5 * 7 * 11, 0, moved)
    assert product(5, 7, 11) == Work(770, 2 * 770, 3 * moved)


def test_attention_moves_queries_keys_values_and_output_and_no_scores():
    forward = 4 * (2 * 3 * 6 * 16 + 2 * 3 * 10 * 16)  # queries, output; keys, values: of 3 rows, 16 wide
    backward = 4 * (4 * 3 * 6 * 16 + 4 * 3 * 10 * 16)  # these four and the output's gradient read, three written
    assert attention(3, 6, 10, 16, gradients=0) == Work(2 * 2 * 3 * 6 * 10 * 16, 0, forward)
    assert attention(3, 6, 10, 16).bytes == forward + backward
    assert attention(3, 6, 10, 16).backward == 2 * attention(3, 6, 10, 16).forward
    shared = attention(6, 4, 10, 16, gradients=0, key_rows=2)  # three rows of queries to each of keys and values
    assert shared.flops == attention(6, 4, 10, 16, gradients=0).flops
    assert shared.bytes == 4 * 16 * (2 * 6 * 4 + 2 * 2 * 10)


def test_half_precision_halves_the_bytes_of_the_encoders_and_no_operations():
    config = small_patches()
    full, half = operations(config, 4, 7, 3), operations(config, 4, 7, 3, bytes_per_number=2)
    for part, work in full.items():
        assert half[part].flops == work.flops
        in_float32 = part in ("CMA", "IMC", "LMI", "similarities in the batch")
        assert half[part].bytes == work.bytes / (1 if in_float32 else 2), part


def test_updates_read_and_write_every_weight():
    work = updates(num_trained=10, num_taught=3)
    assert work["teacher's update"] == Work(0, 0, 4 * 3 * 3)
    assert work["AdamW"] == Work(0, 0, 4 * 7 * 10)
    assert work["AdamW"].intensity == 0


def test_a_last_layer_with_fewer_queries_saves_all_but_keys_and_values_of_the_other_tokens():
    text = small_patches().text_config
    width, inner, tokens, states, pairs, masked = 32, 48, 7, 17, 4, 3
    every, used = FusedRows(4 * pairs, 2 * pairs, tokens), FusedRows(4 * pairs, 2 * pairs, 1 + masked)
    a_token = 4 * width**2 + 2 * width * inner + 2 * (tokens + states) * width  # 4: queries and outputs, twice
    saved = 4 * pairs * (tokens - 1 - masked)  # tokens
    difference = fusion_encoder(text, every, tokens, states).flops - fusion_encoder(text, used, tokens, states).flops
    assert difference == 3 * 2 * saved * a_token


@pytest.mark.parametrize("batch", [(0, 7, 3), (4, 0, 0), (4, 7, 8), (4, 7, -1)])
def test_sizes_that_are_no_batch_are_refused(batch):
    with pytest.raises(ValueError, match="no batch: choose"):
        operations(small_patches(), *batch)


def test_the_table_adds_up_and_tells_what_bounds_a_part():
    config = TCLConfig()
    plan = PlanArguments(gpu_tflops=1.0, gpu_bandwidth=20.0)  # 50 operations a byte
    table = describe_operations(config, 4, 25, "no", plan).split("\n\n")[1]
    rows = [[cell.strip(" <").replace(",", "") for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]]
    *parts, step = rows
    parameters = count_parameters(empty_model(config))
    work = operations(config, 4, 25, 8) | updates(parameters["student"], parameters["teacher"])
    assert [row[0] for row in parts] == [name.replace(",", "") for name in work]

    def as_shown(number: float):
        return pytest.approx(number, rel=6e-3, abs=1e-3)

    for row, part in zip(parts, work.values(), strict=True):
        *numbers, bound = row[1:]
        forward, backward, share, gigabytes, intensity, milliseconds = (float(n.rstrip("%")) for n in numbers)
        assert (forward, backward, gigabytes) == as_shown((part.forward / 1e9, part.backward / 1e9, part.bytes / 1e9))
        assert share == pytest.approx(100 * part.flops / sum(other.flops for other in work.values()), abs=0.06)
        assert intensity == pytest.approx(part.flops / part.bytes, abs=0.6)
        assert bound == ("arithmetic" if part.flops / part.bytes > 50 else "memory")
        assert milliseconds == as_shown(max(part.flops / 1e9, part.bytes / 2e7))
    assert {row[-1] for row in parts} == {"arithmetic", "memory"}
    for column in (1, 2, 4, 6):
        assert float(step[column]) == pytest.approx(sum(float(row[column]) for row in parts), rel=1e-2)
