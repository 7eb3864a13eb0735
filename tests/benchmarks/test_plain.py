"""The plain reference of the benchmarks computes the same as ours and as the original."""

from functools import partial

import pytest
import torch
from helpers import answers, questions_of, stirred, tiny_config, training_batch
from plain import (
    PlainAnswerDecoder,
    PlainTCL,
    draw_negatives,
    plain_features,
    plain_lmi_loss,
    plain_rank_answers,
    plain_rerank,
)
from torch.nn import functional as F

from tcl_hf import TCLForPreTraining, TCLForQuestionAnswering
from tcl_hf.data.collators import masked_positions
from tcl_hf.evaluation.retrieval import NOT_SCORED, EncodedSamples, matching_scores
from tcl_hf.models.losses import lmi_loss, sample_hard_negatives
from tcl_hf.sharing.convert import from_original

SEEDS = [0, 1, 2]
LOSSES = [
    *("loss", "loss_cma", "loss_imc", "loss_lmi", "loss_itm", "loss_mlm"),
    *("loss_i2t", "loss_t2i", "loss_i2i", "loss_t2t", "loss_lmi_image", "loss_lmi_text"),
]


def ours_and_plain(seed: int = 0, **fields) -> tuple[TCLForPreTraining, PlainTCL]:
    """The same random weights in both, teacher and student far apart."""
    ours = stirred(TCLForPreTraining, seed, **fields)
    plain = PlainTCL(ours.config)
    plain.load_state_dict(ours.state_dict())
    return ours.train(), plain.train()


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """A list to which the hard negatives that ours draws are appended: in each step images for texts, then texts."""
    rows = []

    def draw_and_record(logits, excluded):
        index, exists = sample_hard_negatives(logits, excluded)
        rows.append(index)
        return index, exists

    monkeypatch.setattr("tcl_hf.models.modeling_tcl.sample_hard_negatives", draw_and_record)
    return rows


def assert_same_gradients(ours, plain):
    """The error of every gradient is within 1e-4 of its norm, or within 1e-6 where the gradient is truly 0."""
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    computed = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        error = (computed[name] - value).norm()
        assert error <= 1e-4 * value.norm() + 1e-6, f"gradient of {name}: {error:g} off"


def assert_same_steps(ours, plain, drawn, batches, **arguments):
    """Teacher, losses, gradients and queues of several training steps are the same in both."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, plain)]
    for batch in batches:
        drawn.clear()
        for model in (ours, plain):
            model.update_teacher()
        expected = ours(**batch, **arguments)
        negative_image, negative_text = drawn
        computed = plain(**batch, **arguments, negative_image=negative_image, negative_text=negative_text)
        for name in LOSSES:
            torch.testing.assert_close(
                computed[name], expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        for output, optimizer in zip((expected, computed), optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
        assert_same_gradients(ours, plain)
        for optimizer in optimizers:
            optimizer.step()
        state = ours.state_dict()
        for name, value in plain.state_dict().items():
            if name.startswith(("teacher.", "queue.")):
                torch.testing.assert_close(value, state[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_has_our_names_and_ties():
    ours, plain = ours_and_plain()
    assert plain.state_dict().keys() == ours.state_dict().keys()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in plain.named_parameters() if parameter.requires_grad} == trained
    assert plain.lm_head.decoder.weight is plain.tcl.text_model.embeddings.word_embeddings.weight
    teacher = plain.teacher
    assert teacher.lm_head.decoder.weight is teacher.tcl.text_model.embeddings.word_embeddings.weight
    assert teacher.lm_head.decoder.weight is not plain.lm_head.decoder.weight
    decoder = PlainAnswerDecoder(stirred(TCLForQuestionAnswering).text_decoder.config)
    assert decoder.lm_head.decoder.weight is decoder.text_model.embeddings.word_embeddings.weight


def test_plain_training_step_equals_the_original(golden):
    file = golden("pretrain")
    plain = PlainTCL(tiny_config()).train()
    result = plain.load_state_dict(from_original(file["state"], plain.config), strict=False)
    assert not result.unexpected_keys and result.missing_keys == ["queue.ids"]
    inputs, expected = file["in"], file["out"]
    inputs["negative_image"] = inputs.pop("negative_image_index")
    inputs["negative_text"] = inputs.pop("negative_text_index")
    plain.update_teacher()
    output = plain(**inputs)
    output["loss_ita"] = (output.loss_cma + output.loss_imc + output.loss_lmi) / 3
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    output.loss.backward()
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name, value in from_original(file["grad"], plain.config).items():
        error = (parameters[name].grad - value).norm()
        assert error <= 1e-4 * value.norm() + 1e-6, f"gradient of {name}: {error:g} off"
    state = plain.state_dict()
    for name, value in from_original(file["after"], plain.config).items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_steps_with_padded_texts_are_the_same(drawn, seed, implementation):
    ours, plain = ours_and_plain(seed, queue_size=6)  # the second step's push begins at the queue's end
    ours.set_attn_implementation(implementation)
    batches = [training_batch(4, seed=10 * seed + step) for step in range(3)]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert_same_steps(ours, plain, drawn, batches)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_steps_with_masked_positions_and_image_ids_are_the_same(drawn, seed):
    ours, plain = ours_and_plain(seed)
    batches = [training_batch(5, seed=10 * seed + step) for step in range(2)]
    for batch in batches:
        batch["mlm_positions"] = masked_positions(batch["mlm_labels"])
        batch["image_ids"] = torch.tensor([7, 8, 7, -100, -100])
    assert_same_steps(ours, plain, drawn, batches, alpha=0.7)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_steps_with_one_pair_are_the_same(drawn, seed):
    ours, plain = ours_and_plain(seed)
    assert_same_steps(ours, plain, drawn, [training_batch(1, seed=10 * seed + step) for step in range(2)])


@pytest.mark.parametrize("image_ids", [[1, 1, 1], [1, 1, 2]])
def test_a_batch_of_one_image_has_no_negatives_in_either(drawn, image_ids):
    ours, plain = ours_and_plain()
    batch = training_batch(3) | {"image_ids": torch.tensor(image_ids)}
    assert_same_steps(ours, plain, drawn, [batch])


def test_a_batch_of_empty_texts_is_the_same(drawn):
    """Texts of [CLS] alone have no locals and no masked tokens."""
    ours, plain = ours_and_plain()
    batch = training_batch(3)
    for name in ("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels"):
        batch[name] = batch[name][:, :1]
    assert_same_steps(ours, plain, drawn, [batch])


@pytest.mark.parametrize("queue_size", [0, 3])
def test_queues_smaller_than_the_batch_are_the_same(drawn, queue_size):
    ours, plain = ours_and_plain(queue_size=queue_size)
    assert_same_steps(ours, plain, drawn, [training_batch(4, seed=step) for step in range(2)])


def test_other_weights_of_the_objectives_are_the_same(drawn):
    weights = {"cma_weight": 0.9, "imc_weight": 0.2, "lmi_weight": 0.4, "itm_weight": 0.6, "mlm_weight": 1.7}
    ours, plain = ours_and_plain(**weights)
    assert_same_steps(ours, plain, drawn, [training_batch(4)])


@pytest.mark.parametrize(("temperature", "kept"), [(0.9, 0.5), (1e-5, 0.001)])
def test_the_temperature_is_kept_in_its_range(temperature, kept):
    for model in ours_and_plain():
        model.tcl.temperature.data.fill_(temperature)
        model.update_teacher()
        assert model.tcl.temperature.item() == pytest.approx(kept)


def test_dropout_stands_where_ours_has_it(drawn, monkeypatch):
    """Scaling in place of dropout shows that both have dropout in the same places with the same share."""
    scaled = lambda x, p=0.5, training=True, inplace=False: x * (1 - p) if training else x  # noqa: E731
    monkeypatch.setattr("torch.nn.functional.dropout", scaled)
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    ours, plain = ours_and_plain(text_config=dropout, vision_config={"attention_dropout": 0.1})
    ours.set_attn_implementation("eager")
    assert_same_steps(ours, plain, drawn, [training_batch(4)])


def test_eval_mode_drops_nothing_and_pushes_nothing():
    _, plain = ours_and_plain(text_config={"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5})
    plain.eval()
    rows = {"negative_image": torch.tensor([1, 2, 0]), "negative_text": torch.tensor([2, 0, 1])}
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    first, second = (plain(**training_batch(3), **rows).loss for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not torch.equal(plain.train()(**training_batch(3), **rows).loss, first)


def test_plain_negatives_follow_the_softmax_without_the_excluded():
    number, draws = 4, 3000
    logits = torch.randn(number, number, generator=torch.Generator().manual_seed(0))
    excluded = torch.eye(number, dtype=torch.bool)
    excluded[0, 1] = excluded[1, 0] = True
    shares = logits.exp().masked_fill(excluded, 0)
    shares = shares / shares.sum(-1, keepdim=True)
    torch.manual_seed(0)
    rows = torch.stack([draw_negatives(logits, excluded) for _ in range(draws)])  # (draws, N)
    counted = F.one_hot(rows, number).float().mean(0)
    assert not counted[excluded].any()
    error = (shares * (1 - shares) / draws).sqrt()
    assert ((counted - shares).abs() <= 4 * error).all()


def test_plain_draws_its_own_negatives_in_training():
    _, plain = ours_and_plain()
    output = plain(**training_batch(4))
    output.loss.backward()
    assert output.loss.isfinite() and plain.itm_head.weight.grad.any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [False, True])
def test_lmi_is_the_same(seed, masked):
    generator = torch.Generator().manual_seed(seed)
    unit = partial(F.normalize, dim=-1)
    features = unit(torch.randn(5, 16, generator=generator)).requires_grad_()
    parts = unit(torch.randn(5, 6, 16, generator=generator))
    tau = torch.tensor(0.1, requires_grad=True)
    mask = None
    if masked:
        lengths = torch.randint(0, 7, (5,), generator=generator)
        lengths[:2] = torch.tensor([0, 6])
        mask = (torch.arange(6) < lengths[:, None]).long()
    ours, plain = (loss(features, parts, tau, mask) for loss in (lmi_loss, plain_lmi_loss))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    inputs = (features, tau)
    for computed, expected in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, plain)), strict=True):
        assert (computed - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@pytest.mark.parametrize(("number", "length", "masked"), [(1, 4, False), (3, 0, False), (3, 2, True)])
def test_lmi_without_others_or_locals_is_zero_in_both(number, length, masked):
    features, parts = torch.ones(number, 2, requires_grad=True), torch.ones(number, length, 2)
    mask = torch.zeros(number, length) if masked else None
    for loss in (lmi_loss, plain_lmi_loss):
        value = loss(features, parts, torch.tensor(0.1), mask)
        assert value.item() == 0
        assert not torch.autograd.grad(value, features)[0].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_features_are_the_same(seed):
    ours, plain = ours_and_plain(seed)
    batch = questions_of(ours.config, 5, seed)
    image, text = plain_features(plain.eval(), **batch)
    with torch.no_grad():
        expected = ours.eval().tcl(**batch)
    torch.testing.assert_close(image, expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, rtol=0, atol=1e-5)
    assert plain_features(plain, batch["pixel_values"])[1] is None
    assert plain_features(plain, None, batch["input_ids"], batch["attention_mask"])[0] is None


def encoded(ours: TCLForPreTraining, num_images: int, num_texts: int, seed: int) -> EncodedSamples:
    """Images and texts, encoded by a model."""
    texts = training_batch(num_texts, config=ours.config, seed=seed)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    with torch.no_grad():
        image_states = ours.tcl.encode_image(texts["pixel_values"][:num_images])
        text_states = ours.tcl.encode_text(ids, mask)
        return EncodedSamples(
            image_rows=list(range(num_images)),
            image_states=image_states,
            text_states=text_states,
            attention_mask=mask,
            image_embeds=ours.tcl.image_features(image_states),
            text_embeds=ours.tcl.text_features(text_states),
            image_of_text=torch.arange(num_texts) % num_images,
            texts=[],
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 3, 50])
def test_reranked_scores_are_the_same(seed, k):
    ours, plain = (model.eval() for model in ours_and_plain(seed))
    pairs = encoded(ours, 6, 9, seed)
    scores = matching_scores(ours, pairs, k)  # only pairs that either direction picks are scored
    directions = plain_rerank(plain, pairs, k)
    similarity = pairs.image_embeds @ pairs.text_embeds.mT
    picked = []
    for dim, computed in ((1, directions[0]), (0, directions[1])):
        rank = similarity.argsort(dim=dim, descending=True).argsort(dim=dim)
        picked.append(rank < k)
        torch.testing.assert_close(computed, scores.masked_fill(rank >= k, NOT_SCORED), rtol=0, atol=1e-5)
    assert torch.equal(scores != NOT_SCORED, picked[0] | picked[1])


def test_reranking_of_some_rows_leaves_out_the_others():
    ours, plain = (model.eval() for model in ours_and_plain())
    pairs = encoded(ours, 6, 9, 0)
    whole, some = plain_rerank(plain, pairs, 3), plain_rerank(plain, pairs, 3, images=[1, 4], texts=[8])
    torch.testing.assert_close(some[0][[1, 4]], whole[0][[1, 4]])
    torch.testing.assert_close(some[1][:, 8], whole[1][:, 8])
    assert [int((scores != NOT_SCORED).sum()) for scores in some] == [2 * 3, 3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("number", "k"), [(1, 4), (3, 4), (3, 50)])
def test_ranked_answers_are_the_same(seed, number, k):
    ours = stirred(TCLForQuestionAnswering, seed).eval()
    decoder = PlainAnswerDecoder(ours.text_decoder.config).eval()
    decoder.load_state_dict(ours.text_decoder.state_dict())
    batch = questions_of(ours.config, number, seed)
    candidates, mask = answers(12, seed=seed)
    expected = ours.rank_answers(**batch, candidate_ids=candidates, candidate_mask=mask, k=k)
    with torch.no_grad():
        image_states = ours.tcl.encode_image(batch["pixel_values"])
        text_states = ours.tcl.encode_text(batch["input_ids"], batch["attention_mask"])
        questions = ours.tcl.fuse(text_states, batch["attention_mask"], image_states).last_hidden_state
    computed = plain_rank_answers(decoder, questions, batch["attention_mask"], candidates, mask, k)
    assert torch.equal(computed.indices, expected.indices)
    torch.testing.assert_close(computed.probabilities, expected.probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(computed.scores, expected.scores, rtol=1e-5, atol=1e-5)
