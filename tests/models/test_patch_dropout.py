"""Patch dropout: the student reads a share of the patches in a step of pre-training; all others read every patch."""

from itertools import pairwise

import pytest
import torch
from helpers import small_patches, training_batch
from torch._dynamo.testing import CompileCounter

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining, TCLVisionModel
from tcl_hf.models.encoders import drop_patches
from tcl_hf.models.losses import lmi_loss, pool_locals

PATCHES = 16  # of 8 pixels, in an image of 32


def new_model(model_class=TCLForPreTraining, **fields):
    torch.manual_seed(0)
    return model_class(small_patches(**{"patch_dropout": 0.5} | fields)).train()


def losses_of(model, batch: dict, seed: int = 1) -> list[float]:
    torch.manual_seed(seed)
    output = model(**batch, alpha=0.4)
    return [getattr(output, f"loss_{name}").item() for name in ("cma", "imc", "lmi", "itm", "mlm")]


@pytest.mark.parametrize(
    ("patches", "share", "kept"), [(16, 0.5, 8), (16, 0.75, 4), (16, 0.1, 14), (16, 0.99, 1), (10, 0.9, 1), (1, 0.5, 1)]
)
def test_the_right_number_of_patches_is_kept_and_the_class_token(patches, share, kept):
    numbers = torch.arange(1 + patches).expand(3, -1)[..., None].float()  # each state is its position
    for row in drop_patches(numbers, share).squeeze(-1).tolist():
        assert len(row) == 1 + kept and row[0] == 0
        assert all(a < b for a, b in pairwise(row))  # none twice, and in their order


def test_register_tokens_are_kept_before_the_patches():
    numbers = torch.arange(1 + 3 + PATCHES).expand(5, -1)[..., None].float()
    for row in drop_patches(numbers, 0.75, num_register_tokens=3).squeeze(-1).tolist():
        assert row[:4] == [0, 1, 2, 3] and len(row) == 4 + 4
        assert all(a < b for a, b in pairwise(row))
    model = TCLVisionModel(small_patches(vision_config={"num_register_tokens": 3}).vision_config)
    some = model(torch.randn(2, 3, 32, 32), output_hidden_states=True, patch_dropout=0.75)
    assert some.hidden_states[0].shape == (2, 1 + 3 + 4, 24) and some.last_hidden_state.shape == (2, 1 + 4, 24)
    assert torch.equal(some.hidden_states[0][:, 1:4], model.embeddings.register_tokens.expand(2, -1, -1))


def test_the_first_layer_reads_the_kept_patches_with_their_own_positions():
    model = TCLVisionModel(small_patches().vision_config)
    images = torch.randn(5, 3, 32, 32)
    whole = model(images).last_hidden_state.shape, model(images, output_hidden_states=True).hidden_states[0]
    some = model(images, output_hidden_states=True, patch_dropout=0.75)
    assert whole[0] == (5, 1 + PATCHES, 24) and some.last_hidden_state.shape == (5, 1 + 4, 24)
    same = (some.hidden_states[0][:, :, None] == whole[1][:, None]).all(-1)  # (5, kept, all)
    assert (same.sum(-1) == 1).all()  # each is one of the whole image's
    places = same.int().argmax(-1)
    assert (places[:, 0] == 0).all() and len({tuple(row) for row in places.tolist()}) > 1  # other patches each


def test_every_patch_and_every_two_patches_are_equally_likely():
    """Counts of 4,000 draws lie within five standard deviations: one test in 10,000 would fail by chance."""
    images, kept = 4000, 4
    numbers = torch.arange(1 + PATCHES).expand(images, -1)[..., None]
    torch.manual_seed(0)
    chosen = torch.zeros(images, 1 + PATCHES, dtype=torch.long)
    chosen.scatter_(1, drop_patches(numbers, 0.75).squeeze(-1), 1)
    together = (chosen[:, 1:].T.float() @ chosen[:, 1:].float()).double()
    one, two = kept / PATCHES, kept * (kept - 1) / (PATCHES * (PATCHES - 1))
    off_diagonal = ~torch.eye(PATCHES, dtype=torch.bool)
    for counts, likely in ((together.diagonal(), one), (together[off_diagonal], two)):
        assert (counts - images * likely).abs().max() < 5 * (images * likely * (1 - likely)) ** 0.5


def test_half_precision_draws_as_float32_does():
    """bfloat16 has 256 random numbers between 0 and 1: among equal ones the first patches would be kept more often."""
    states = torch.arange(1 + PATCHES).expand(50, -1)[..., None]
    draws = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        draws.append(drop_patches(states.to(dtype), 0.5).float())
    assert torch.equal(*draws)


def test_without_it_nothing_is_drawn_and_nothing_left_out(monkeypatch):
    monkeypatch.setattr("tcl_hf.models.encoders.drop_patches", lambda *_: pytest.fail("patches were dropped"))
    model = new_model(patch_dropout=0.0)
    before = torch.get_rng_state()
    assert model.tcl.encode_image(training_batch()["pixel_values"]).shape[1] == 1 + PATCHES
    assert torch.equal(torch.get_rng_state(), before)
    model(**training_batch()).loss.backward()


def test_the_student_drops_patches_in_train_mode_and_the_teacher_never(monkeypatch):
    model, read, fused = new_model(), [], []
    for name, tcl in (("student", model.tcl), ("teacher", model.teacher.tcl)):
        tcl.vision_model.register_forward_hook(
            lambda module, inputs, output, name=name: read.append((name, output.last_hidden_state.shape[1]))
        )
        fuse = tcl.fuse
        monkeypatch.setattr(tcl, "fuse", lambda *a, n=name, f=fuse, **k: fused.append((n, a[2].shape[1])) or f(*a, **k))
    model(**training_batch(), alpha=0.4)
    assert read == [("student", 1 + 8), ("teacher", 1 + 16)]
    assert fused == [("student", 1 + 8), ("teacher", 1 + 16)]  # matching and words read what the encoder saw
    read.clear()
    model.eval()(**training_batch(), alpha=0.4)
    assert read == [("student", 1 + 16), ("teacher", 1 + 16)]


def test_losses_in_eval_mode_are_those_of_whole_images():
    batch = training_batch()
    ours, whole = (new_model(patch_dropout=share).eval() for share in (0.5, 0.0))
    assert losses_of(ours, batch) == losses_of(whole, batch)
    assert losses_of(ours.train(), batch) != losses_of(whole.train(), batch)


def test_lmi_compares_with_the_regions_of_whole_images():
    model, batch = new_model(), training_batch()
    output = model(**batch, alpha=0.4)
    with torch.no_grad():
        teacher = model.teacher.tcl
        patches = teacher.patch_features(teacher.encode_image(batch["pixel_values_augmented"]))
        regions = pool_locals(patches, (4, 4), 4)
        tokens = teacher.token_features(teacher.encode_text(batch["input_ids"], batch["attention_mask"]))
        image = lmi_loss(output.image_embeds, regions, model.tcl.temperature)
        text = lmi_loss(output.text_embeds, tokens, model.tcl.temperature, batch["attention_mask"][:, 1:])
    torch.testing.assert_close(output.loss_lmi_image, image, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss_lmi_text, text, rtol=0, atol=1e-6)


def test_only_kept_patches_have_a_gradient():
    model, batch = new_model(), training_batch()
    batch["pixel_values"].requires_grad_()
    model(**batch, alpha=0.4).loss.backward()
    gradient = batch["pixel_values"].grad.unflatten(-1, (4, 8)).unflatten(-3, (4, 8))  # (N, 3, 4, 8, 4, 8)
    assert ((gradient != 0).any(5).any(3).any(1).flatten(1).sum(1) == 8).all()  # 8 of the 4 x 4 patches
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_patches(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = new_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(1)
        model(**training_batch(), alpha=0.4).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"gather_negatives": True}, {"imc_weight": 0, "lmi_weight": 0}])
def test_other_objectives_and_sizes_of_images_train(fields):
    model, batch = new_model(**fields), training_batch()
    for name in ("pixel_values", "pixel_values_augmented"):
        batch[name] = torch.nn.functional.interpolate(batch[name], size=(48, 40))  # 6 x 5 patches
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, alpha=0.4, interpolate_pos_encoding=True).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fine_tuning_for_retrieval_sees_whole_images(tmp_path):
    """The config of a checkpoint still has the patch dropout of its pre-training."""
    new_model().save_pretrained(tmp_path)
    model = TCLForImageTextRetrieval.from_pretrained(tmp_path).train()
    assert model.config.patch_dropout == 0.5
    seen = []
    model.tcl.vision_model.register_forward_hook(lambda m, i, output: seen.append(output.last_hidden_state.shape[1]))
    batch = training_batch()
    model(**{name: value for name, value in batch.items() if "mlm" not in name}, alpha=0.4)
    assert seen == [1 + PATCHES]


def test_it_compiles_to_one_graph_which_draws_anew():
    model = new_model().tcl.vision_model
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    images = training_batch()["pixel_values"]
    first, second = (compiled(images, patch_dropout=0.5).last_hidden_state for _ in range(2))
    assert first.shape == (4, 1 + 8, 24) and not torch.equal(first, second)
    assert counter.frame_count == 1
