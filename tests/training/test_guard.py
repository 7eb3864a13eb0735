"""Updates that are not finite are masked, and leave everything as it was."""

import math

import pytest
import torch

from tcl_hf.training.guard import NonFiniteError


def test_a_masked_update_leaves_weights_and_optimizer_as_they_were(tmp_path):
    """A masked step changes nothing, and the next good step is as if it had not been."""
    from tcl_hf.training.guard import UpdateGuard

    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    guard = UpdateGuard(torch.device("cpu"))

    def step(scale: float) -> None:
        loss = (layer(torch.ones(1, 3)) * scale).sum()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        guard.watch(optimizer, 0, loss, norm)
        optimizer.step()
        optimizer.zero_grad()

    step(1.0)
    weights = layer.weight.clone()
    moments = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    step(math.inf)
    assert torch.equal(layer.weight, weights)
    assert all(torch.equal(optimizer.state[layer.weight][k], v) for k, v in moments.items())
    step(1.0)
    assert not torch.equal(layer.weight, weights) and torch.isfinite(layer.weight).all()
    with pytest.raises(NonFiniteError):
        guard.check(None)
