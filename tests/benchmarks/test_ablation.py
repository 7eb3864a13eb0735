"""The benchmark that switches our optimizations off one at a time: without each, the numbers are the same."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from ablation import OFF, OPT_IN, Step
from helpers import small_patches, training_batch

from tcl_hf.data.collators import masked_positions

# Without these, draws have the same distribution, but differ.
RANDOM = ["own attention kernel where there is dropout", "negatives without a loop"]
REPLACED = {  # the function that is called where an optimization is off, and not where it is on
    "own attention kernel where there is dropout": "torch.nn.functional.scaled_dot_product_attention",
    "LMI by one logsumexp": "ablation.plain_lmi_loss",
    "negatives without a loop": "ablation.draw_negatives",
}


@pytest.fixture
def step(request):
    """A step without dropout, except for the kernel that is used with dropout."""
    torch.manual_seed(0)
    dropout = 0.3 if request.node.callspec.params["name"].startswith("own") else 0.0
    config = small_patches(text_config={"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout})
    batch = training_batch(5, config=config)
    return Step(config, batch | {"mlm_positions": masked_positions(batch["mlm_labels"])})


def losses_and_gradients(step: Step, way) -> dict[str, torch.Tensor]:
    """A step from the same weights, teacher, queues and random state: losses, gradients and the state after it."""
    state = {name: value.clone() for name, value in step.model.state_dict().items()}
    torch.manual_seed(1)
    with way(step):
        step.model.update_teacher()
        output = step.forward(**step.batch, alpha=0.4)
        output.loss.backward()
        found = {name: value.detach() for name, value in output.items() if name.startswith("loss")}
        found |= {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}
        step.optimizer.step()
        step.optimizer.zero_grad()
    found |= {f"after {name}": value.clone() for name, value in step.model.state_dict().items()}
    step.model.load_state_dict(state)
    step.fused.state.clear()
    step.loop.state.clear()
    return found


@pytest.mark.parametrize("name", [name for name in OFF if name not in RANDOM])
def test_without_an_optimization_the_numbers_are_the_same(step, name):
    expected = losses_and_gradients(step, lambda step: nullcontext())
    found = losses_and_gradients(step, OFF[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    again = losses_and_gradients(step, lambda step: nullcontext())  # it is on again afterwards
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", [*RANDOM, *OPT_IN])
def test_other_options_run_and_are_reset_afterwards(step, name):
    expected = losses_and_gradients(step, lambda step: nullcontext())
    way = (OFF | OPT_IN)[name]
    assert losses_and_gradients(step, way)["loss"].isfinite()
    again = losses_and_gradients(step, lambda step: nullcontext())
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", REPLACED)
def test_without_an_optimization_the_other_function_runs(step, name, monkeypatch):
    calls = []
    module, _, function = REPLACED[name].rpartition(".")
    original = getattr(importlib.import_module(module), function)

    def noted(*args, **kwargs):
        if kwargs.get("dropout_p", 1) > 0:  # image layers have no dropout and use PyTorch's kernel
            calls.append(function)
        return original(*args, **kwargs)

    monkeypatch.setattr(REPLACED[name], noted)
    losses_and_gradients(step, lambda step: nullcontext())
    assert not calls
    losses_and_gradients(step, OFF[name])
    assert calls
