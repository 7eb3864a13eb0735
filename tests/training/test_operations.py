"""Counts of a step: operations against torch's counter and by hand, activations against a real step, bytes by hand."""

import pytest
import torch
from helpers import EVERY_VISION_PART, small_patches, tiny_config, training_batch
from pretrain_step import SIZES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.training.operations import LOSSES, Step, StepCounter, Work, empty_model, locked_flops, run_step, updates

PAIRS, TOKENS, MASKED = 4, 7, 4
WIDTH, INNER, STATES = 24, 96, 17  # `small_patches`: image encoder, with 16 patches
TEXT_WIDTH, TEXT_INNER = 32, 48
ALBEF = {"cma_weight": 1, "imc_weight": 0, "lmi_weight": 0}
CMA = ALBEF | {"itm_weight": 0, "mlm_weight": 0}
ALONE = {f"{name}_weight": 0 for name in ("cma", "imc", "lmi", "itm", "mlm")}
NO_FUSION = {"text_config": {"num_hidden_layers": 2, "fusion_layer": 2}}
TAUGHT_WORDS = ("language-model head, teacher", "fusion encoder, teacher", "keys and values of images, teacher")


@pytest.fixture(scope="module")
def step() -> Step:
    return run_step(small_patches(), PAIRS, TOKENS)


def kept_by_a_real_step(config: TCLConfig, checkpointing: bool = False, **images: torch.Tensor) -> int:
    """Return the bytes that a step on real tensors keeps for its backward pass; `images` replace those of the batch."""
    torch.manual_seed(0)
    model = TCLForPreTraining(config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # As many masked words as are typical: six masked words in a text of seven tokens are rarer than one in 500.
    masked = torch.arange(1, 1 + MASKED).repeat(PAIRS, 1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        batch = training_batch(PAIRS, TOKENS) | images
        model(**batch, image_ids=torch.arange(PAIRS), mlm_positions=masked, alpha=0.4)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def flops_of_torch(config: TCLConfig, pairs: int, tokens: int, masked: int) -> int:
    """Return the operations of a step with eager attention, of which torch's counter sees every product."""
    model = empty_model(config).train()
    model.set_attn_implementation("eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cpu")
        model.tie_weights()
        batch = {name: mode.from_tensor(value) for name, value in training_batch(pairs, tokens, config).items()}
        batch["mlm_positions"] = torch.zeros(pairs, masked, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
    return counter.get_total_flops()


CASES = {
    "tiny": (tiny_config(), 4, 7, 3),
    "one pair": (small_patches(), 1, 5, 1),
    "short texts": (small_patches(), 3, 2, 1),
    "nothing masked": (small_patches(), 3, 6, 0),
    "small": (TCLConfig(**SIZES["small"], queue_size=1000), 8, 25, 8),
    "base": (TCLConfig(), 4, 25, 8),
    "no queue": (small_patches(queue_size=0), 2, 30, 5),
    "larger images": (small_patches(vision_config={"image_size": 64}, text_config={"fusion_layer": 1}), 2, 11, 2),
    "registers, norm and gates": (small_patches(vision_config=EVERY_VISION_PART), 4, 7, 3),
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
    "locked vision": (small_patches(lock_vision=True), 4, 7, 3),
    "partly locked": (small_patches(lock_vision=1, lock_text=1), 4, 7, 3),
    "locked encoders": (small_patches(lock_vision=True, lock_text=True), 4, 7, 3),
    "shared keys and values": (small_patches(text_config={"images_per_text": 2}), 4, 7, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_pytorch_counts(case):
    config, pairs, tokens, masked = CASES[case]
    assert run_step(config, pairs, tokens, num_masked=masked).flops == flops_of_torch(config, pairs, tokens, masked)


def product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def attention(queries: int, keys: int, width: int) -> int:
    """Operations of the scores of one row, and of the values that they weight."""
    return product(queries, width, keys) + product(queries, keys, width)


def text_layer(rows: int, queries: int, num_states: int = 0, texts: int | None = None) -> int:
    """Operations of a layer on texts, of which some tokens are queries; with cross-attention to image states if any.

    Self-attention is that of `texts`, which the rows share; each row has its own if None.
    """
    texts = rows if texts is None else texts
    width, num_queries = TEXT_WIDTH, rows * queries
    query_and_output = 2 * product(num_queries, width, width)
    own = 2 * product(texts * TOKENS, width, width) + 2 * product(texts * queries, width, width)
    own += texts * attention(queries, TOKENS, width)
    cross = (query_and_output + rows * attention(queries, num_states, width)) if num_states else 0
    return own + cross + 2 * product(num_queries, width, TEXT_INNER)


@pytest.mark.parametrize(
    ("masked", "patch_dropout", "registers"),
    [(MASKED, 0, 0), (0, 0, 0), (TOKENS - 1, 0, 0), (MASKED, 0.5, 0), (MASKED, 0, 3), (MASKED, 0.5, 3)],
)
def test_parts_of_a_step_by_hand(masked, patch_dropout, registers):
    """Register tokens are states of the image encoder alone."""
    patches, seen = product(PAIRS * 16, 3 * 8 * 8, WIDTH), 9 if patch_dropout else STATES  # seen by the student

    def image(states: int) -> int:
        states += registers
        linear = 4 * product(PAIRS * states, WIDTH, WIDTH) + 2 * product(PAIRS * states, WIDTH, INNER)
        return patches + 2 * (linear + PAIRS * attention(states, states, WIDTH))

    def keys_and_values(states: int) -> int:
        return 2 * 2 * product(PAIRS * states, WIDTH, TEXT_WIDTH)

    def fusion(rows: int, texts: int, states: int) -> int:
        """Two layers, of which the last one has the queries of [CLS] and the masked tokens alone.

        Before the first one reads images, it reads each text once.
        """
        return text_layer(rows, TOKENS, states, texts) + text_layer(rows, 1 + masked, states)

    text = 2 * text_layer(2 * PAIRS, TOKENS)  # the texts as they are, and with masks
    matches = product(3 * PAIRS, TEXT_WIDTH, 2)
    words = product(PAIRS * masked, TEXT_WIDTH, TEXT_WIDTH) + product(PAIRS * masked, TEXT_WIDTH, 80)
    wholes = product(PAIRS, WIDTH, 16) + product(PAIRS, TEXT_WIDTH, 16)
    parts_of_wholes = product(PAIRS * 16, WIDTH, 16) + product(PAIRS * (TOKENS - 1), TEXT_WIDTH, 16)
    # CMA compares in two directions with the keys, as student and as teacher; IMC as student alone.
    to_keys = product(PAIRS, 16, PAIRS + 20)
    # LMI compares with all locals of the batch and computes their mean key at once; then each sample with its own.
    others = sum(2 * product(PAIRS, 16, PAIRS * number) for number in (16, TOKENS - 1))
    own = PAIRS * sum(product(1, 16, number) for number in (16, TOKENS - 1))
    in_batch = 3 * product(PAIRS, 16, PAIRS)  # the returned logits, and hard negatives in two directions
    expected = {
        "image encoder, student": (image(seen), 2 * image(seen) - patches),  # pixels need no gradient
        "image encoder, teacher": (image(STATES), 0),
        "text encoder, student": (text, 2 * text),
        "text encoder, teacher": (text, 0),
        "keys and values of images, student": (keys_and_values(seen), 2 * keys_and_values(seen)),
        "keys and values of images, teacher": (keys_and_values(STATES), 0),
        "fusion encoder, student": (fusion(4 * PAIRS, 2 * PAIRS, seen), 2 * fusion(4 * PAIRS, 2 * PAIRS, seen)),
        "fusion encoder, teacher": (fusion(PAIRS, PAIRS, STATES), 0),
        "language-model head, student": (words, 2 * words),
        "language-model head, teacher": (words, 0),
        "projections, student": (wholes, 2 * wholes),
        "projections, teacher": (wholes + parts_of_wholes, 0),
        "matching head": (matches, 2 * matches),
        LOSSES: ((4 + 2) * to_keys + others + own + in_batch, (2 + 2) * to_keys + own),  # keys have no gradient
    }
    config = small_patches(patch_dropout=patch_dropout, vision_config={"num_register_tokens": registers})
    work = run_step(config, PAIRS, TOKENS, num_masked=masked).work
    counted = {part: (work.forward, work.backward) for part, work in work.items()}
    assert counted == {part: flops for part, flops in expected.items() if any(flops)}


@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        ("CMA", ("matching", "language-model", "fusion", "keys and values")),
        ("ITM", ("language-model", *TAUGHT_WORDS)),
        ("MLM", ("matching", LOSSES)),
        ("MLM without teacher", ("matching", LOSSES, "teacher")),
        ("no soft targets", TAUGHT_WORDS),
    ],
)
def test_objectives_of_weight_0_cost_nothing(step, case, left_out):
    expected = {part for part in step.work if not any(name in part for name in left_out)}
    assert set(run_step(*CASES[case][:3]).work) == expected


def count(part: str, call) -> Work:
    """Run a call of a small model forward and backward, and return the work of a part."""
    model = TCLForPreTraining(small_patches())
    counter = StepCounter(model)
    with counter.counting():
        output = call(model)
        if output.requires_grad:
            output.square().sum().backward()  # the gradient of a sum alone would be one number, expanded
    return counter.work[part]


def test_a_product_moves_its_three_matrices_once_for_itself_and_once_for_each_gradient():
    flops, moved = product(5, TEXT_WIDTH, 2), 4 * (5 * TEXT_WIDTH + TEXT_WIDTH * 2 + 5 * 2)
    states = torch.randn(5, TEXT_WIDTH)

    def match(states: torch.Tensor) -> Work:
        return count("matching head", lambda model: model.itm_head(states))

    assert match(states.clone().requires_grad_()) == Work(flops, 2 * flops, 3 * moved)
    assert match(states) == Work(flops, flops, 2 * moved)
    with torch.no_grad():
        assert match(states) == Work(flops, 0, moved)


def test_weights_that_serve_every_row_are_read_once():
    states = torch.randn(3, 6, WIDTH)[:, 1:]  # not contiguous, for which torch expands the weights to all rows
    work = count("projections, teacher", lambda model: model.teacher.tcl.visual_projection(states))
    assert work == Work(product(15, WIDTH, 16), 0, 4 * (15 * WIDTH + WIDTH * 16 + 15 * 16))


def test_attention_moves_queries_keys_values_and_output_and_no_scores():
    # Three rows of two heads, each 8 wide, with 6 queries and 10 keys.
    query, key, value = (torch.randn(3, 2, length, 8, requires_grad=True) for length in (6, 10, 10))
    work = count(LOSSES, lambda model: F.scaled_dot_product_attention(query, key, value))
    flops = 3 * attention(6, 10, 16)
    forward = 4 * (2 * 3 * 6 * 16 + 2 * 3 * 10 * 16)  # queries, output; keys, values
    backward = 4 * (4 * 3 * 6 * 16 + 4 * 3 * 10 * 16)  # reads these four and the output's gradient, writes three
    assert work == Work(flops, 2 * flops, forward + backward)


def test_texts_of_an_image_read_its_keys_and_values_once():
    texts, tokens, images, width = 6, 4, 2, TEXT_WIDTH
    states = torch.randn(texts, tokens, width)
    key, value = torch.randn(2, images, 4, 10, width // 4).unbind()

    def attend(model: TCLForPreTraining) -> torch.Tensor:
        return model.teacher.tcl.text_model.fusion_layers[0].cross_attn(states, key_value=(key, value))[0]

    work = count(LOSSES, attend)
    assert work.forward == 2 * product(texts * tokens, width, width) + texts * attention(tokens, 10, width)
    linear = 4 * (2 * texts * tokens * width + width**2)
    assert work.bytes == 2 * linear + 4 * width * (2 * texts * tokens + 2 * images * 10)


def test_half_precision_halves_the_bytes_of_the_encoders_and_no_operations(step):
    half = run_step(small_patches(), PAIRS, TOKENS, "bf16")
    assert half.flops == step.flops
    for part, work in step.work.items():
        assert half.work[part].flops == work.flops
        assert half.work[part].bytes == work.bytes / (1 if part == LOSSES else 2), part  # losses are float32


def test_updates_read_and_write_every_weight():
    work = updates(num_trained=10, num_taught=3)
    assert work["teacher's update"] == Work(0, 0, 4 * 3 * 3)
    assert work["AdamW"] == Work(0, 0, 4 * 7 * 10)
    assert work["AdamW"].intensity == 0


def test_the_teacher_s_calls_of_locked_layers_are_its_own_work():
    locked = run_step(small_patches(lock_vision=True, lock_text=True), PAIRS, TOKENS).work
    free = run_step(small_patches(), PAIRS, TOKENS).work
    for part, work in free.items():
        assert locked[part].forward == work.forward, part
    for part in ("image encoder, student", "text encoder, student"):
        assert locked[part].backward == 0 < free[part].backward


@pytest.mark.parametrize(("lock", "rest"), [(True, 0), (1, 1)])
def test_a_step_that_reads_states_runs_the_layers_above_the_lock_only(lock, rest):
    config = small_patches(lock_vision=lock)
    read, seen = (run_step(config, PAIRS, TOKENS, from_states=from_states).work for from_states in (True, False))
    layer = 4 * product(STATES, WIDTH, WIDTH) + 2 * product(STATES, WIDTH, INNER) + attention(STATES, STATES, WIDTH)
    for name in ("student", "teacher"):
        part = f"image encoder, {name}"
        assert read.get(part, Work()).forward == rest * PAIRS * layer
    for part in seen.keys() - {"image encoder, student", "image encoder, teacher"}:
        assert read[part] == seen[part], part
    embedding = product(STATES - 1, 3 * 8 * 8, WIDTH)
    assert locked_flops(config) == embedding + (2 - rest) * layer


@pytest.mark.parametrize("lock", [True, 1])
def test_activations_of_a_step_that_reads_states_are_those_of_a_real_step(lock):
    config = small_patches(lock_vision=lock)
    states = {
        name: torch.randn(PAIRS, STATES, WIDTH, dtype=torch.float16)
        for name in ("pixel_values", "pixel_values_augmented")
    }
    planned = run_step(config, PAIRS, TOKENS, from_states=True).activations
    assert planned == pytest.approx(kept_by_a_real_step(config, **states), rel=1e-3)


@pytest.mark.parametrize("batch", [(0, 7, 3), (4, 0, 0), (4, 0, None), (4, 7, 8), (4, 7, -1)])
def test_sizes_that_do_not_make_a_batch_are_refused(batch):
    pairs, tokens, masked = batch
    with pytest.raises(ValueError, match="do not make a batch: choose"):
        run_step(small_patches(), pairs, tokens, num_masked=masked)


@pytest.mark.parametrize("patch_dropout", [0, 0.5])
def test_activations_and_operations_are_those_of_a_real_step(patch_dropout):
    config = small_patches(patch_dropout=patch_dropout)
    step = run_step(config, PAIRS, TOKENS)
    assert step.activations == pytest.approx(kept_by_a_real_step(config), rel=1e-3)
    assert step.activations == sum(step.activations_by_part.values())
    assert step.flops == flops_of_torch(config, PAIRS, TOKENS, MASKED)


def test_activations_of_the_encoders_by_hand():
    """Dropout in the texts keeps float32 masks on a CPU. Attention keeps no weights."""
    config = small_patches(text_config={"hidden_dropout_prob": 0.1})
    kept = run_step(config, PAIRS, TOKENS).activations_by_part

    def layer(width: int, inner: int, heads: int = 4) -> int:
        """Floats per state: inputs, means and deviations of two norms; what attention reads, its queries, keys, values,
        result and one sum per head; what feed-forward reads, before and after its activation."""
        return 2 * (width + 2) + (width + 3 * width + width + heads) + (width + 2 * inner)

    states = PAIRS * STATES
    pixels = PAIRS * 3 * 32 * 32
    last_norm = WIDTH + 2
    assert kept["image encoder, student"] == 4 * (pixels + states * (2 * layer(WIDTH, INNER) + last_norm))
    width, tokens = TEXT_WIDTH, 2 * PAIRS * TOKENS  # texts as they are, and with masks
    embeddings = (width + 2) + width  # norm and dropout
    dropout = 2 * width  # in each layer
    padding = 2 * tokens * TOKENS  # each layer makes its own mask of what each token may see
    ids = tokens + TOKENS + 1  # word ids, positions and the type
    floats = tokens * (embeddings + 2 * (layer(width, TEXT_INNER) + dropout)) + padding
    assert kept["text encoder, student"] == 4 * floats + 8 * ids


def test_checkpointing_keeps_what_a_real_step_keeps_and_one_layer(step):
    activations = kept_by_a_real_step(small_patches(), checkpointing=True)
    whole = kept_by_a_real_step(small_patches())
    planned = run_step(small_patches(), PAIRS, TOKENS, checkpointing=True)
    assert planned.activations == pytest.approx(activations, rel=1e-3)
    assert planned.flops < step.flops / 2  # the forward pass alone
    assert activations < planned.activations + step.largest_layer < whole
    num_layers = 2 + 4  # layers of a kind keep about the same; the fusion layers, half of these, keep the most
    assert planned.activations + step.largest_layer - activations < 3 * whole / num_layers


def test_half_precision_keeps_less_and_copies_of_the_weights():
    config, large = small_patches(), 64
    full, half = (run_step(config, large, TOKENS, precision).activations for precision in ("no", "bf16"))
    assert 0.4 * full < half < 0.85 * full
