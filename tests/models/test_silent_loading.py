"""A checkpoint that is not the whole of what is opened is refused: what is missing would have random values."""

import pytest
from helpers import small_patches, tiny_processor
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPTextConfig, ViTConfig

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLForQuestionAnswering,
    TCLForTextAssignment,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
    TCLProcessor,
    TCLTextConfig,
    TCLTextModel,
    TCLTokenizer,
    TCLVisionConfig,
    TCLVisionModel,
)
from tcl_hf.models.checksums import CHECKSUMS

HEADS = [TCLForQuestionAnswering, TCLForVisualEntailment, TCLForVisualReasoning, TCLForTextAssignment]


def pre_trained(folder, model_class: type = TCLForPreTraining) -> None:
    model_class(small_patches()).save_pretrained(folder)


def without(folder, part: str) -> None:
    """Take the weights with a part of their name out of a saved model."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file, {"format": "pt"})
    (folder / CHECKSUMS).unlink()


@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("model_class", [TCLModel, TCLForPreTraining, *HEADS])
def test_another_number_of_layers_than_the_file_has_is_refused(tower, change, model_class, tmp_path):
    pre_trained(tmp_path)
    config = TCLConfig.from_pretrained(tmp_path)
    getattr(config, tower).num_hidden_layers += change
    problem = "lacks .* weights, such as" if change > 0 else "has .* weights for which the model has no place, such as"
    with pytest.raises(ValueError, match=f"is not a whole {model_class.__name__}: it {problem}"):
        model_class.from_pretrained(tmp_path, config=config)
    if model_class is TCLModel:
        assert isinstance(model_class.from_pretrained(tmp_path, config=config, strict=False), TCLModel)


@pytest.mark.parametrize(
    ("model_class", "part"),
    [
        (TCLModel, "layers.1."),
        (TCLModel, "visual_projection"),
        (TCLModel, "temperature"),
        (TCLForImageTextRetrieval, "itm_head.bias"),
        (TCLForImageTextRetrieval, "text_model.embeddings.layer_norm"),
        (TCLForPreTraining, "lm_head.dense.weight"),
        (TCLForMaskedLM, "cross_attn.k_proj"),
        (TCLVisionModel, "layers.0.fc1"),
        (TCLTextModel, "position_embeddings"),
        *((head, "text_model.layers.0.fc1") for head in HEADS),
    ],
)
def test_a_cut_checkpoint_is_refused(model_class, part, tmp_path):
    pre_trained(tmp_path)
    without(tmp_path, part)
    with pytest.raises(ValueError, match=r"it lacks .* weights, such as .*strict=False"):
        model_class.from_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert isinstance(model, model_class) and any(part in key for key in info["missing_keys"])


def test_a_head_that_is_missing_as_a_whole_starts_new(tmp_path):
    pre_trained(tmp_path, TCLModel)
    for model_class in (TCLForImageTextRetrieval, TCLForPreTraining, TCLForMaskedLM, *HEADS):
        assert isinstance(model_class.from_pretrained(tmp_path), model_class)


@pytest.mark.parametrize("foreign", [ViTConfig, BertConfig, CLIPTextConfig])
def test_configs_of_other_models_are_refused(foreign, tmp_path):
    for part in ("vision_config", "text_config"):
        for given in (foreign().to_dict(), foreign()):
            with pytest.raises(
                ValueError, match=f"{part} is the config of a '{foreign.model_type}' and not of a 'tcl_"
            ):
                TCLConfig(**{part: given})
    foreign().save_pretrained(tmp_path)
    for config_class in (TCLVisionConfig, TCLTextConfig):
        with pytest.raises(ValueError, match=f"is the config of a '{foreign.model_type}'"):
            config_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the config of a 'tcl_text_model' and not of a 'tcl_vision_model'"):
        TCLConfig(vision_config=TCLTextConfig())


def test_a_bert_is_not_opened_as_one_of_our_encoders(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=80, **sizes)).save_pretrained(tmp_path)
    for model_class in (TCLVisionModel, TCLTextModel, TCLModel):
        with pytest.raises(ValueError, match="'bert'"):
            model_class.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    small_patches().save_pretrained(tmp_path)
    processor = tiny_processor()
    with pytest.raises(ValueError, match=r"no vocabulary: its folder needs tokenizer\.json or vocab\.txt"):
        TCLTokenizer.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert len(TCLTokenizer.from_pretrained(tmp_path)) == len(processor.tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"vocabulary|tokenizer"):
        TCLProcessor.from_pretrained(tmp_path)
