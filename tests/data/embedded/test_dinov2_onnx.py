"""A DINOv2 that was exported as a part of an ONNX graph comes back with every weight, bit for bit."""

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from tcl_hf.data.embedded.dinov2_onnx import read_dinov2

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "use_mask_token": False}
SIZES |= {"image_size": 42, "patch_size": 14}


class Salience(nn.Module):
    """A DINOv2 and a head with a linear layer and a convolution, to be left out."""

    def __init__(self):
        super().__init__()
        self.backbone = Dinov2Model(Dinov2Config(**SIZES))
        self.widen = nn.Linear(16, 16)
        self.decoder = nn.Conv1d(16, 1, 1)

    def forward(self, images):
        states = self.widen(self.backbone(images).last_hidden_state)  # (N, 1 + P, 16)
        return self.decoder(states.transpose(1, 2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, with random values everywhere, and its file in the format that PyTorch's tracing exporter writes."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    torch.manual_seed(0)
    model = Salience().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(model, (torch.randn(1, 3, 28, 28),), str(file), dynamo=False, opset_version=14)
    return model, file


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_every_weight_comes_back_bit_for_bit(exported):
    model, file = exported
    read = read_dinov2(file, Dinov2Config(**SIZES)).state_dict()
    expected = model.backbone.state_dict()
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("decoder", {}, "'decoder' is not a DINOv2.*embeddings.cls_token"),
        ("backbone", {"num_hidden_layers": 1}, "encoder.layer.1.*left over"),
        ("backbone", {"num_hidden_layers": 3}, "encoder.layer.2.*missing"),
    ],
)
def test_another_model_is_refused(exported, part, fields, message):
    _, file = exported
    with pytest.raises(ValueError, match=message):
        read_dinov2(file, Dinov2Config(**SIZES | fields), part)
