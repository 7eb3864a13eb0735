"""Each loss against a slow loop written from the method's text, against a closed form, and at its edges."""

import math

import pytest
import torch
from torch.nn import functional as F

from tcl_hf.models.losses import (
    NO_IMAGE_ID,
    answer_loss,
    cma_loss,
    distilled_cross_entropy,
    draw_two_images,
    imc_loss,
    itm_loss,
    lmi_loss,
    mlm_loss,
    pool_locals,
    positive_targets,
    sample_hard_negatives,
    soft_cross_entropy,
)

N, K, L, D, V = 4, 9, 3, 6, 11


def unit(*shape: int, seed: int, grad: bool = False) -> torch.Tensor:
    values = F.normalize(
        torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    return values.requires_grad_(grad)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


def assert_same(fast, slow, *inputs):
    """Value and gradients of the fast loss equal those of the slow one."""
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture
def tau():
    return torch.tensor(0.2, requires_grad=True)


def slow_contrast(query, teacher, keys, targets, tau, alpha):
    """Cross-entropy against mixed targets, one key at a time."""
    total = 0.0
    for i in range(len(query)):
        exponentials = [torch.exp(query[i] @ keys[j] / tau) for j in range(len(keys))]
        with torch.no_grad():
            soft = [torch.exp(teacher[i] @ keys[j] / tau) for j in range(len(keys))]
        for j in range(len(keys)):
            target = (1 - alpha) * targets[i, j] + alpha * soft[j] / sum(soft)
            total = total - target * torch.log(exponentials[j] / sum(exponentials))
    return total / len(query)


def test_cma_equals_slow_loop(tau):
    image, text = unit(N, D, seed=1, grad=True), unit(N, D, seed=2, grad=True)
    teacher_image, teacher_text = unit(N, D, seed=3), unit(N, D, seed=4)
    image_keys = torch.cat([teacher_image, unit(K - N, D, seed=5)])
    text_keys = torch.cat([teacher_text, unit(K - N, D, seed=6)])
    targets = torch.eye(N, K)
    i2t = cma_loss(image, teacher_image, text_keys, targets, tau, 0.4)
    t2i = cma_loss(text, teacher_text, image_keys, targets, tau, 0.4)
    assert_same(i2t, slow_contrast(image, teacher_image, text_keys, targets, tau, 0.4), image, tau)
    assert_same(t2i, slow_contrast(text, teacher_text, image_keys, targets, tau, 0.4), text, tau)


def test_cma_of_equal_features_is_the_log_of_the_number_of_keys(tau):
    same = unit(1, D, seed=0).expand(K, D)
    targets = torch.eye(N, K)
    loss = cma_loss(same[:N], same[:N], same, targets, tau, 0.4)
    assert loss.item() == pytest.approx(math.log(K), abs=1e-6)


def test_cma_with_alpha_one_is_the_teachers_entropy_where_the_student_equals_it(tau):
    features, keys = unit(N, D, seed=1), unit(K, D, seed=2)
    p = (features @ keys.T / tau).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    loss = cma_loss(features, features, keys, torch.eye(N, K), tau, 1.0)
    torch.testing.assert_close(loss, entropy, rtol=1e-5, atol=1e-6)
    (gradient,) = gradients(loss, tau)
    assert abs(gradient) < 1e-5  # cross-entropy is least where both distributions are equal


def test_imc_equals_slow_loop_with_hard_targets(tau):
    image, text = unit(N, D, seed=1, grad=True), unit(N, D, seed=2, grad=True)
    image_keys, text_keys = unit(K, D, seed=3), unit(K, D, seed=4)
    targets = torch.eye(N, K)
    i2i, t2t = imc_loss(image, image_keys, targets, tau), imc_loss(text, text_keys, targets, tau)
    assert_same(i2i, slow_contrast(image, image.detach(), image_keys, targets, tau, 0.0), image, tau)
    assert_same(t2t, slow_contrast(text, text.detach(), text_keys, targets, tau, 0.0), text, tau)


def test_imc_of_two_orthogonal_keys_is_a_softplus(tau):
    keys = torch.eye(2, D)
    loss = imc_loss(keys, keys, torch.eye(2), tau)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1 / tau.item())), abs=1e-6)


def slow_lmi(features, local_features, tau, mask):
    """Each positive against all locals of the other rows, one at a time."""
    per_sample = []
    for i in range(len(features)):
        others = 0.0
        for j in range(len(features)):
            for k in range(local_features.shape[1]):
                if j != i and mask[j, k]:
                    others = others + torch.exp(features[i] @ local_features[j, k] / tau)
        own = []
        for k in range(local_features.shape[1]):
            if mask[i, k]:
                positive = torch.exp(features[i] @ local_features[i, k] / tau)
                own.append(-torch.log(positive / (positive + others)))
        if own:
            per_sample.append(sum(own) / len(own))
    return sum(per_sample) / len(per_sample)


@pytest.mark.parametrize("masked", [False, True])
def test_lmi_equals_slow_loop(tau, masked):
    features, parts = unit(N, D, seed=1, grad=True), unit(N, L, D, seed=2)
    mask = torch.ones(N, L, dtype=torch.long)
    if masked:
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    loss = lmi_loss(features, parts, tau, mask if masked else None)
    assert_same(loss, slow_lmi(features, parts, tau, mask), features, tau)


def test_lmi_of_equal_features_is_the_log_of_one_plus_the_other_locals(tau):
    same = unit(1, D, seed=0)
    loss = lmi_loss(same.expand(N, D), same.expand(N * L, D).view(N, L, D), tau)
    assert loss.item() == pytest.approx(math.log(1 + (N - 1) * L), abs=1e-6)


def test_lmi_leaves_out_texts_without_locals_and_is_zero_without_any(tau):
    features, parts = unit(2, D, seed=1, grad=True), unit(2, L, D, seed=2)
    nothing = torch.zeros(2, L)
    loss = lmi_loss(features, parts, tau, nothing)
    assert loss.item() == 0
    assert all(torch.isfinite(g).all() for g in gradients(loss, features, tau))


def test_lmi_of_one_row_has_no_negatives_and_finite_gradients(tau):
    features, parts = unit(1, D, seed=1, grad=True), unit(1, L, D, seed=2)
    loss = lmi_loss(features, parts, tau)
    assert loss.item() == 0
    assert all(torch.isfinite(g).all() for g in gradients(loss, features, tau))


@pytest.mark.parametrize("group", [1, 3, 7, 128])
def test_lmi_is_the_same_in_groups_of_any_size(group, monkeypatch):
    torch.manual_seed(0)
    features = F.normalize(torch.randn(7, 16), dim=-1).requires_grad_()
    parts, tau = F.normalize(torch.randn(9, 5, 16), dim=-1), torch.tensor(0.1, requires_grad=True)
    mask = torch.rand(9, 5) < 0.7
    expected = lmi_loss(features, parts, tau, mask)
    monkeypatch.setattr("tcl_hf.models.losses.LMI_GROUP", group)
    found = lmi_loss(features, parts, tau, mask)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (features, tau)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_lmi_refuses_locals_whose_gradient_would_be_lost():
    features, parts = torch.ones(2, 4), torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="LMI learns from the teacher's: detach them"):
        lmi_loss(features, parts, torch.tensor(0.1))
    with torch.no_grad():
        assert lmi_loss(features, parts, torch.tensor(0.1)).isfinite()


def test_lmi_of_texts_without_tokens_is_zero(tau):
    features = unit(N, D, seed=1, grad=True)
    assert lmi_loss(features, torch.empty(N, 0, D), tau, torch.empty(N, 0)).item() == 0


def test_lmi_survives_the_lowest_temperature():
    features, parts = unit(N, D, seed=1, grad=True), unit(N, L, D, seed=2)
    tau = torch.tensor(0.001, requires_grad=True)
    loss = lmi_loss(features, parts, tau)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, features, tau))


def test_lmi_holds_no_tensor_larger_than_the_similarity():
    """It holds N x N x L numbers; the textbook's way takes N x L x (1 + N L)."""
    number, parts = 64, 16
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    features = unit(number, D, seed=1, grad=True)
    with Watch():
        lmi_loss(features, unit(number, parts, D, seed=2), torch.tensor(0.07)).backward()
    assert max(sizes) == number * number * parts


@pytest.mark.parametrize("grid", [(16, 16), (4, 4), (24, 24), (8, 12)])
def test_pooling_is_the_mean_over_blocks_where_the_grid_divides(grid):
    height, width = grid
    patches = torch.randn(2, height * width, D)
    pooled = pool_locals(patches, grid, 4)
    for row in range(4):
        for column in range(4):
            rows = range(row * height // 4, (row + 1) * height // 4)
            columns = range(column * width // 4, (column + 1) * width // 4)
            block = torch.stack([patches[:, r * width + c] for r in rows for c in columns])
            torch.testing.assert_close(pooled[:, row * 4 + column], block.mean(0), rtol=1e-5, atol=1e-6)


def test_pooling_a_grid_smaller_than_the_regions_repeats_patches():
    patches = torch.randn(1, 4, D)
    pooled = pool_locals(patches, (2, 2), 4)
    assert pooled.shape == (1, 16, D)
    torch.testing.assert_close(pooled[:, 0], patches[:, 0])
    torch.testing.assert_close(pooled[:, 15], patches[:, 3])


def test_positive_targets_share_mass_among_keys_of_one_image():
    targets = positive_targets(torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, 8, 9, NO_IMAGE_ID]))
    expected = torch.tensor([[0.5, 0, 0.5, 0, 0, 0], [0, 0.5, 0, 0.5, 0, 0], [0.5, 0, 0.5, 0, 0, 0]])
    assert torch.equal(targets, expected)


def test_positive_targets_without_id_are_the_own_key_alone():
    none = torch.full((3,), NO_IMAGE_ID)
    assert torch.equal(positive_targets(none, torch.full((5,), NO_IMAGE_ID)), torch.eye(3, 5))


def test_hard_negatives_follow_the_exact_distribution():
    """50,000 draws of each row against the softmax with excluded columns set to 0, by a chi-square test."""
    torch.manual_seed(0)
    logits = torch.tensor([[5.0, 1.0, 0.0, -1.0], [2.0, 9.0, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 1.0, 1.0, 8.0]])
    excluded = torch.eye(4, dtype=torch.bool)
    excluded[2, 0] = True
    draws = 50_000
    repeated, hidden = logits.repeat(draws, 1), excluded.repeat(draws, 1)
    index, exists = sample_hard_negatives(repeated, hidden)
    assert exists.all()
    weights = logits.softmax(-1).masked_fill(excluded, 0)
    expected = weights / weights.sum(-1, keepdim=True) * draws
    counts = F.one_hot(index.view(draws, 4), 4).sum(0).double()
    assert (counts[excluded] == 0).all()
    for row in range(4):
        possible = expected[row] > 0
        statistic = ((counts[row] - expected[row])[possible] ** 2 / expected[row][possible]).sum()
        assert statistic < 16.3  # 99.9 % quantile of chi-square with at most 3 degrees of freedom


def test_hard_negatives_report_rows_without_any():
    excluded = torch.tensor([[True, True], [False, True]])
    index, exists = sample_hard_negatives(torch.zeros(2, 2), excluded)
    assert exists.tolist() == [False, True]
    assert index[1] == 0


def test_hard_negatives_survive_similarities_whose_softmax_underflows():
    logits = torch.tensor([[1000.0, -1000.0, -1000.0]]).repeat(100, 1)
    excluded = torch.tensor([[True, False, False]]).repeat(100, 1)
    index, exists = sample_hard_negatives(logits, excluded)
    assert exists.all()
    assert (index > 0).all()


def test_itm_equals_slow_loop_and_leaves_out_missing_pairs():
    logits = torch.randn(6, 2, requires_grad=True)
    labels = torch.tensor([1, 1, 0, 0, 0, 0])
    mask = torch.tensor([True, True, True, False, True, False])
    slow = sum(-logits[i].log_softmax(-1)[labels[i]] for i in range(6) if mask[i]) / 4
    assert_same(itm_loss(logits, labels, mask), slow, logits)


def test_itm_of_equal_logits_is_log_two():
    loss = itm_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0]), torch.ones(3, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_mlm_equals_slow_loop_with_soft_targets():
    logits = torch.randn(5, V, requires_grad=True)
    teacher = torch.randn(5, V)
    labels = torch.tensor([3, -100, 0, 10, -100])
    hard, soft, counted = 0.0, 0.0, 0
    for i, label in enumerate(labels.tolist()):
        if label != -100:
            counted += 1
            log_p = torch.log(logits[i].exp() / logits[i].exp().sum())
            q = teacher[i].exp() / teacher[i].exp().sum()
            hard, soft = hard - log_p[label], soft - sum(q[v] * log_p[v] for v in range(V))
    assert_same(mlm_loss(logits, labels, teacher, 0.3), (0.7 * hard + 0.3 * soft) / counted, logits)
    assert_same(mlm_loss(logits, labels), hard / counted, logits)


def test_mlm_of_equal_logits_is_the_log_of_the_vocabulary():
    assert mlm_loss(torch.zeros(2, V), torch.tensor([1, 2])).item() == pytest.approx(math.log(V), abs=1e-6)


def test_mlm_is_zero_with_finite_gradients_if_nothing_is_masked():
    logits = torch.randn(2, V, requires_grad=True)
    loss = mlm_loss(logits, torch.tensor([-100, -100]), torch.randn(2, V), 0.4)
    assert loss.item() == 0
    assert torch.equal(gradients(loss, logits)[0], torch.zeros(2, V))


def test_soft_cross_entropy_with_one_hot_targets_is_cross_entropy():
    logits, labels = torch.randn(5, V), torch.randint(V, (5,))
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(labels, V).float()), expected)


def slow_distilled(logits, label, teacher, alpha):
    """One row, one class at a time."""
    log_p = [logit - torch.log(sum(other.exp() for other in logits)) for logit in logits]
    if label == -100:
        return 0 * log_p[0]
    total = sum(math.exp(other) for other in teacher.tolist())
    soft = -sum(math.exp(other) / total * log_p[number] for number, other in enumerate(teacher.tolist()))
    return (1 - alpha) * -log_p[label] + alpha * soft


@pytest.mark.parametrize("as_tensor", [False, True])
def test_distilled_cross_entropy_equals_slow_loop(as_tensor):
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, V, requires_grad=True), torch.randn(5, V)
    labels = torch.tensor([3, -100, 0, 10, -100])
    for alpha in (0.0, 0.3, 1.0):
        given = torch.tensor(alpha) if as_tensor else alpha
        computed = distilled_cross_entropy(logits, labels, teacher, given)
        slow = torch.stack([slow_distilled(logits[i], int(labels[i]), teacher[i], alpha) for i in range(5)])
        torch.testing.assert_close(computed, slow, rtol=1e-5, atol=1e-6)
        assert_same(computed.sum(), slow.sum(), logits)
        assert (computed[labels == -100] == 0).all()
    hard = [slow_distilled(logits[i], int(labels[i]), teacher[i], 0.0) for i in range(5)]
    torch.testing.assert_close(distilled_cross_entropy(logits, labels), torch.stack(hard), rtol=1e-5, atol=1e-6)


def test_distilled_cross_entropy_of_equal_logits_is_the_log_of_the_classes():
    loss = distilled_cross_entropy(torch.zeros(2, V), torch.tensor([1, 2]), torch.randn(2, V), 0.4)
    torch.testing.assert_close(loss, torch.full((2,), math.log(V)))


def test_distilled_cross_entropy_gives_the_teacher_no_gradient():
    logits, teacher = torch.randn(2, V, requires_grad=True), torch.randn(2, V, requires_grad=True)
    distilled_cross_entropy(logits, torch.tensor([1, 2]), teacher, 0.4).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_answer_loss_equals_slow_loop(alpha):
    """Summed over tokens, not averaged: a longer answer counts for more."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(N, L, V, requires_grad=True), torch.randn(N, L, V)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100], [5, 6, -100], [-100, -100, -100]])
    weights, num_questions, slow = torch.tensor([1.0, 0.5, 0.2, 0.7]), 2, 0.0
    for answer in range(N):
        for token in range(L):
            loss = slow_distilled(logits[answer, token], int(labels[answer, token]), teacher[answer, token], alpha)
            slow = slow + weights[answer] * loss / num_questions
    assert_same(answer_loss(logits, labels, weights, num_questions, teacher, alpha), slow, logits)
    if alpha == 0:
        assert_same(answer_loss(logits, labels, weights, num_questions), slow, logits)


def test_answer_loss_of_equal_logits_counts_the_weighted_tokens():
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    loss = answer_loss(torch.zeros(2, 3, V), labels, torch.tensor([0.5, 1.0]), 4)
    assert loss.item() == pytest.approx((0.5 * 2 + 1.0 * 3) * math.log(V) / 4, rel=1e-6)


@pytest.fixture(scope="module")
def drawn_images():
    """4,000 draws for a batch of four: first and second images and labels, each (4000, 4), and the similarities."""
    torch.manual_seed(0)
    features = unit(N, D, seed=1)
    draws = [torch.stack(draw_two_images(features, temperature=0.5)) for _ in range(4000)]
    return (*torch.stack(draws, dim=1), features @ features.T / 0.5)


def chi_square(counts: torch.Tensor, shares: torch.Tensor) -> float:
    expected = shares.double() / shares.sum() * counts.sum()
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    return ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum().item()


def test_drawn_images_include_the_own_image_where_the_label_says(drawn_images):
    first, second, labels, _ = drawn_images
    own = torch.arange(N).expand_as(first)
    assert torch.equal(first == own, labels == 0)
    assert torch.equal(second == own, labels == 1)
    assert (first != second).all()  # without replacement
    counts = torch.bincount(labels.flatten(), minlength=3)
    assert chi_square(counts, torch.ones(3)) < 13.8  # 99.9 % quantile with 2 degrees of freedom


def test_drawn_others_follow_the_softmax_without_the_own(drawn_images):
    """One other image by the softmax; a second one by the softmax of those that are left: by a chi-square test."""
    first, second, labels, logits = drawn_images
    for row in range(N):
        share = logits[row].exp() * (torch.arange(N) != row)
        share = share / share.sum()
        one = torch.cat([second[labels[:, row] == 0, row], first[labels[:, row] == 1, row]])
        assert chi_square(torch.bincount(one, minlength=N), share) < 13.8  # 2 degrees of freedom
        neither = labels[:, row] == 2
        both_rows = first[neither, row] * N + second[neither, row]
        both = share[:, None] * share / (1 - share[:, None]) * (1 - torch.eye(N))
        assert chi_square(torch.bincount(both_rows, minlength=N * N), both.flatten()) < 20.5  # 5 degrees of freedom


@pytest.mark.parametrize("number", [1, 2])
def test_texts_with_too_few_other_images_have_no_label(number):
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        first, second, labels = draw_two_images(unit(number, D, seed=1))
        own = torch.arange(number)
        for indices in (first, second):
            assert ((indices >= 0) & (indices < number)).all()
        for row in range(number):
            seen.add(int(labels[row]))
            if labels[row] >= 0:
                rows = (own[row], 1 - own[row])
                assert (first[row], second[row]) == (rows if labels[row] == 0 else rows[::-1])
    assert seen == ({-100} if number == 1 else {0, 1, -100})


def test_drawing_survives_features_that_are_all_equal():
    first, second, labels = draw_two_images(unit(1, D, seed=0).expand(3, D))
    assert (first != second).all() and (labels >= 0).all()


def test_losses_are_float32_under_autocast(tau):
    features = unit(N, D, seed=1).bfloat16()
    keys = unit(K, D, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = imc_loss(features, keys, torch.eye(N, K), tau)
        local = lmi_loss(features, keys[:8].view(4, 2, D), tau)
    assert loss.dtype == local.dtype == torch.float32
    exact = imc_loss(features.float(), keys.float(), torch.eye(N, K), tau)
    torch.testing.assert_close(loss, exact)


def test_several_hard_negatives_are_drawn_without_replacement_from_the_exact_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5]).repeat(40_000, 1)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    excluded[:, 3] = True
    index, exists = sample_hard_negatives(logits, excluded, 2)
    first, second = index.view(2, -1)
    assert exists.all()
    assert (first != second).all()
    assert (index != 3).all()
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    for one in range(3):
        for other in range(3):
            if one != other:  # drawn one after the other without replacement
                expected = p[one] * p[other] / (1 - p[one])
                found = ((first == one) & (second == other)).float().mean()
                assert abs(found - expected) < 0.01


def test_rows_with_too_few_columns_have_fewer_hard_negatives():
    excluded = torch.eye(3, dtype=torch.bool)
    excluded[0] = True
    excluded[1, 0] = True
    _, exists = sample_hard_negatives(torch.zeros(3, 3), excluded, 2)
    assert exists.tolist() == [False, True, True, False, False, True]


def test_several_negatives_share_the_weight_of_one():
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0, 0, 0, 0])  # one text, one image, two negatives of each, of which one does not exist
    mask = torch.tensor([True, True, True, True, False])
    each = [float(-logits[row].log_softmax(0)[labels[row]]) for row in range(5)]
    expected = (each[0] + 0.5 * (each[1] + each[2] + each[3])) / (1 + 3 * 0.5)
    assert itm_loss(logits, labels, mask, num_negatives=2).item() == pytest.approx(expected, abs=1e-6)
