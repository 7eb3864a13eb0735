"""Adapters, devices, precisions, quantisation, export and search, as in `docs/interoperability.md`."""

import copy
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers import EVERY_VISION_PART, png, small_patches, tiny_processor, tiny_records, training_batch
from torch.nn import functional as F
from transformers import AutoProcessor, Trainer, TrainingArguments

from tcl_hf import (
    TCLConfig,
    TCLForImageTextRetrieval,
    TCLForMaskedLM,
    TCLForPreTraining,
    TCLForVisualEntailment,
    TCLForVisualReasoning,
    TCLModel,
    TCLVisionModel,
)
from tcl_hf.data.images import open_image
from tcl_hf.evaluation.retrieval import encode_samples, matching_scores
from tcl_hf.inference.export import ImageFeatures, export_onnx, export_programs
from tcl_hf.training.trainer_callback import TCLMomentumCallback

PAGE = Path(__file__).parents[1] / "docs" / "interoperability.md"
INPUTS = ("input_ids", "attention_mask", "pixel_values")
NUM_PHOTOS = 6


def snippets() -> dict[str, str]:
    """The Python of each section of the page."""
    _, *sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    code = {text.splitlines()[0]: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for text in sections}
    assert all(len(found) <= 1 for found in code.values())
    return {name: found[0] for name, found in code.items() if found}


@pytest.fixture
def run_snippet(tmp_path, monkeypatch):
    """Run the snippet of a section beside a tiny model and generated pictures; return its variables."""
    processor = tiny_processor()
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches(text_config={"vocab_size": len(processor.tokenizer)}))
    model.save_pretrained(tmp_path / "runs" / "openmoji")
    processor.save_pretrained(tmp_path / "runs" / "openmoji")
    (tmp_path / "photos").mkdir()
    for number in range(NUM_PHOTOS):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(number))
    monkeypatch.chdir(tmp_path)

    def run(section: str) -> dict:
        file = tmp_path / "snippet.py"
        file.write_text(snippets()[section])
        return runpy.run_path(str(file))

    return run


def features_of_photos_and_texts(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `TCLModel` for the pictures and texts of a snippet."""
    model, processor = TCLModel.from_pretrained("runs/openmoji"), AutoProcessor.from_pretrained("runs/openmoji")
    images = [open_image(f"photos/{number}.png").convert("RGB") for number in range(NUM_PHOTOS)]
    with torch.no_grad():
        output = model(**processor(images=images, text=texts, return_tensors="pt"))
    return output.image_embeds, output.text_embeds


def outputs_of(model, batch: dict) -> torch.Tensor:
    """Matching logits or logits, in eval mode."""
    with torch.no_grad():
        output = model.eval()(**{name: batch[name] for name in INPUTS})
    return output.logits if "logits" in output else output.itm_logits


def test_the_tests_run_every_snippet_of_the_page():
    source = Path(__file__).read_text()
    assert snippets()
    for section in snippets():
        assert f'run_snippet("{section}")' in source, section


# Adapters

CLASSES = [TCLForPreTraining, TCLForImageTextRetrieval, TCLForVisualEntailment]


def with_lora(model, **fields):
    """The model with adapters of rank 4 and scale 2 on all projections to queries and values but the teacher's."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    common = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r"teacher\..*"}
    return peft.get_peft_model(model, peft.LoraConfig(**common | fields))


def batch_for(model_class) -> dict:
    batch = training_batch(4)
    if model_class is TCLForVisualEntailment:
        return {name: batch[name] for name in INPUTS} | {"labels": torch.tensor([0, 1, 2, 0])}
    return batch


@pytest.fixture(params=CLASSES, ids=lambda model_class: model_class.__name__)
def trained(request, tmp_path):
    """A model folder, its model with adapters after two steps, parameters before, losses and batch."""
    model_class = request.param
    torch.manual_seed(0)
    model_class(small_patches()).save_pretrained(tmp_path / "base")
    heads = {"modules_to_save": ["cls_head"]} if model_class is TCLForVisualEntailment else {}
    model = with_lora(model_class.from_pretrained(tmp_path / "base"), **heads).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = batch_for(model_class)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(2):
        model.update_teacher()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model_class, tmp_path, model, before, losses, batch


def test_two_steps_with_lora_change_adapters_and_saved_heads_only(trained):
    _, _, model, before, losses, _ = trained
    assert all(math.isfinite(loss) for loss in losses)
    students = {name: p for name, p in model.named_parameters() if ".teacher." not in name}
    changed = {name for name, parameter in students.items() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in students if ".lora_" in name or ".modules_to_save." in name}
    assert not any(".teacher." in name and ".lora_" in name for name in before)


def test_adapters_save_reload_and_merge_to_the_same_outputs(trained):
    model_class, folder, model, _, _, batch = trained
    from peft import PeftModel

    expected = outputs_of(model, batch)
    model.save_pretrained(folder / "adapter")
    # The adapter has rank 4 and the model a width of 24 to 32; in a base model it is a hundredth of the weights.
    sizes = [(folder / name).stat().st_size for name in ("adapter/adapter_model.safetensors", "base/model.safetensors")]
    assert sizes[0] < sizes[1] / 5

    base = model_class.from_pretrained(folder / "base", use_momentum_teacher=False)
    assert not torch.allclose(outputs_of(base, batch), expected, atol=1e-3)
    reloaded = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(outputs_of(reloaded, batch), expected, rtol=0, atol=0)
    merged = reloaded.merge_and_unload()
    assert type(merged) is model_class
    torch.testing.assert_close(outputs_of(merged, batch), expected, rtol=1e-5, atol=1e-6)
    at_once = model_class.from_pretrained(folder / "adapter")  # transformers opens the model below the adapter
    torch.testing.assert_close(outputs_of(at_once, batch), expected, rtol=0, atol=0)


def test_the_teacher_follows_the_weights_with_their_adapters():
    model = with_lora(TCLForVisualEntailment(small_patches(momentum=0.9)), modules_to_save=["cls_head"])
    student, teacher = model.get_base_model(), model.teacher
    adapted = student.tcl.vision_model.layers[1].self_attn.q_proj
    followed = teacher.tcl.vision_model.layers[1].self_attn.q_proj.weight
    head, taught = (part.cls_head.modules_to_save["default"][2].weight for part in (student, teacher))
    with torch.no_grad():
        for weight in (adapted.lora_B["default"].weight, head):
            weight.normal_()
    a, b = (getattr(adapted, name)["default"].weight for name in ("lora_A", "lora_B"))
    merged = adapted.base_layer.weight + 8 / 4 * (b @ a)
    expected = 0.9 * followed + 0.1 * merged
    expected_head = 0.9 * taught + 0.1 * head
    base = adapted.base_layer.weight.detach().clone()
    model.update_teacher()
    torch.testing.assert_close(followed, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(taught, expected_head.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(adapted.base_layer.weight, base)


def test_a_teacher_with_adapters_of_its_own_is_refused():
    model = with_lora(TCLForImageTextRetrieval(small_patches()), exclude_modules=None)
    with pytest.raises(ValueError, match="exclude_modules"):
        model.update_teacher()


def test_the_trainers_callback_moves_teacher_and_alpha_below_adapters(tmp_path):
    model = with_lora(TCLForVisualEntailment(small_patches(alpha=0.4)))
    batch = training_batch(4)
    rows = [{name: batch[name][row] for name in INPUTS} | {"labels": torch.tensor(row % 3)} for row in range(4)]
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    teacher = copy.deepcopy(model.teacher)
    Trainer(model, args, train_dataset=rows, callbacks=[TCLMomentumCallback()]).train()
    assert model.get_base_model().alpha == pytest.approx(0.1)  # the second of four steps of the first epoch
    weights = [t.tcl.text_model.layers[0].self_attn.v_proj.weight for t in (teacher, model.teacher)]
    assert not torch.equal(*weights)


def test_the_snippet_of_adapters_gives_an_ordinary_model(run_snippet):
    pytest.importorskip("peft", reason="PEFT is not installed")
    found = run_snippet("LoRA")
    assert type(found["model"]) is TCLForVisualEntailment
    assert not [name for name, _ in found["model"].named_modules() if "lora" in name]


# Devices and precision


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_gives_the_same_outputs(device_map, tmp_path):
    TCLForPreTraining(small_patches()).save_pretrained(tmp_path, max_shard_size="200KB")
    batch = training_batch(3)
    expected = outputs_of(TCLForPreTraining.from_pretrained(tmp_path), batch)
    model = TCLForPreTraining.from_pretrained(tmp_path, device_map=device_map).cpu()
    assert torch.equal(outputs_of(model, batch), expected)


@pytest.mark.parametrize("model_class", [TCLForImageTextRetrieval, TCLForMaskedLM, TCLForVisualEntailment])
def test_weights_left_on_disk_give_the_same_outputs(model_class, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("device_map='auto' would use the GPU")
    model_class(small_patches()).save_pretrained(tmp_path)
    batch = training_batch(3)
    expected = outputs_of(model_class.from_pretrained(tmp_path, use_momentum_teacher=False), batch)
    model = model_class.from_pretrained(
        tmp_path,
        use_momentum_teacher=False,
        device_map="auto",
        max_memory={"cpu": "60KB"},
        offload_folder=tmp_path / "disk",
    )
    assert {"cpu", "meta"} == {parameter.device.type for parameter in model.parameters()}
    assert torch.equal(outputs_of(model, batch), expected)


def test_weights_left_on_disk_are_those_fitted_to_the_model(tmp_path):
    """Image positions for another size, fusion layers for two images, and one encoder of a whole model."""
    if torch.cuda.is_available():
        pytest.skip("device_map='auto' would use the GPU")
    config = small_patches(
        id2label={0: "false", 1: "true"}, label2id={"false": 0, "true": 1}, use_momentum_teacher=False
    )
    TCLForVisualEntailment(config).save_pretrained(tmp_path)
    larger = TCLConfig.from_pretrained(tmp_path)
    larger.vision_config.image_size = 64
    batch = training_batch(3)
    texts, images = {name: batch[name] for name in INPUTS[:2]}, torch.randn(3, 3, 64, 64)
    two_images = torch.stack([batch["pixel_values"], batch["pixel_values_augmented"]], dim=1)
    for model_class, fields, inputs in (
        (TCLModel, {"config": larger}, texts | {"pixel_values": images}),
        (TCLForVisualReasoning, {}, texts | {"pixel_values": two_images}),
        (TCLVisionModel, {}, {"pixel_values": batch["pixel_values"]}),
    ):
        offload = {
            "device_map": "auto",
            "max_memory": {"cpu": "10KB"},
            "offload_folder": tmp_path / model_class.__name__,
        }
        model = model_class.from_pretrained(tmp_path, **fields)
        on_disk = model_class.from_pretrained(tmp_path, **fields, **offload)
        with torch.no_grad():
            expected, found = model(**inputs), on_disk(**inputs)
        for name, tensor in expected.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(found[name], tensor), f"{model_class.__name__}: {name}"


# bfloat16 has 8 significant bits and float16 11: rounding of 4e-3 and 5e-4, times what a few layers add up.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_close_and_keeps_features_and_losses_in_float32(dtype, tolerance, tmp_path):
    # Matching is left out, because its negatives are drawn from similarities.
    TCLForPreTraining(small_patches(itm_weight=0)).save_pretrained(tmp_path)
    exact, half = (TCLForPreTraining.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, dtype))
    assert half.tcl.text_projection.weight.dtype == half.teacher.tcl.text_projection.weight.dtype == dtype
    assert {half.tcl.temperature.dtype, half.queue.image.dtype, half.queue.text.dtype} == {torch.float32}
    batch = training_batch(4)
    with torch.no_grad():
        for training in (True, False):  # Train mode computes losses; the model has dropout 0.
            expected, found = (
                model.train(training)(**batch if training else {name: batch[name] for name in INPUTS})
                for model in (copy.deepcopy(exact), copy.deepcopy(half))
            )
            names = {name for name in expected if isinstance(expected[name], torch.Tensor)}
            names -= {"logits_per_image", "logits_per_text"}  # Division by the temperature multiplies the error by 14.
            assert {"image_embeds", "text_embeds"} < names
            for name in names:
                assert found[name].dtype == (dtype if name == "itm_logits" else torch.float32), name
                torch.testing.assert_close(
                    found[name].float(), expected[name], rtol=tolerance, atol=tolerance, msg=name
                )


def test_a_model_in_bfloat16_re_ranks_as_in_float32():
    processor, records = tiny_processor(), tiny_records(6)
    exact = TCLForImageTextRetrieval(small_patches(text_config={"vocab_size": len(processor.tokenizer)})).eval()
    half = copy.deepcopy(exact).to(torch.bfloat16)
    half.tcl.temperature.data = exact.tcl.temperature.data.clone()  # from_pretrained keeps it so
    found, expected = (matching_scores(m, encode_samples(m, processor, records), k=12) for m in (half, exact))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_the_snippet_of_devices_opens_the_model_in_its_precision(run_snippet):
    model = run_snippet("Devices and precision")["model"]
    assert model.dtype == torch.bfloat16 and model.tcl.temperature.dtype == torch.float32


# Quantisation


def test_int8_weights_keep_features_and_take_less_room(run_snippet):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = run_snippet("Quantised")["model"].cpu()
    exact = TCLForImageTextRetrieval.from_pretrained("runs/openmoji", use_momentum_teacher=False)
    exact.save_pretrained("runs/float32")
    batch = training_batch(4)
    inputs = {name: batch[name] for name in INPUTS}
    with torch.no_grad():
        expected, found = exact(**inputs), model(**inputs)
        for name in ("image_embeds", "text_embeds"):
            assert F.cosine_similarity(found[name], expected[name]).min() > 0.99
        reopened = TCLForImageTextRetrieval.from_pretrained("runs/int8", use_momentum_teacher=False)(**inputs)
    assert torch.equal(reopened.itm_logits, found.itm_logits)
    # Embeddings, a third of so small a model, stay float32.
    sizes = [Path(f"runs/{name}/model.safetensors").stat().st_size for name in ("int8", "float32")]
    assert sizes[0] < 0.7 * sizes[1]


# Export

# Numbers of images, texts and tokens: one of each; one image for all texts; an image for each text; the longest text.
SIZES = [(1, 1, 1), (1, 5, 7), (4, 4, 9), (3, 2, 40)]


def parts_by_hand(model, pixel_values, input_ids, attention_mask, image_index) -> list[list[torch.Tensor]]:
    """The outputs of the eager model for images, texts, and pairs whose images are repeated."""
    with torch.no_grad():
        image, text = model.tcl.vision_model(pixel_values), model.tcl.text_model(input_ids, attention_mask)
        fused = model.tcl.text_model(
            input_ids, attention_mask, encoder_hidden_states=image.last_hidden_state[image_index]
        )
        return [
            [model.tcl.get_image_features(pixel_values).pooler_output, image.last_hidden_state],
            [model.tcl.get_text_features(input_ids, attention_mask).pooler_output, text.last_hidden_state],
            [model.itm_head(fused.last_hidden_state[:, 0])],
        ]


def example(num_images: int, num_texts: int, length: int) -> tuple[torch.Tensor, ...]:
    """Pixels, token ids, their mask with padding, and the image of each text."""
    batch = training_batch(num_texts, length)
    generator = torch.Generator().manual_seed(length)
    batch["attention_mask"][:, 0] = 1
    return (
        torch.randn(num_images, 3, 32, 32, generator=generator),
        batch["input_ids"],
        batch["attention_mask"],
        torch.randint(num_images, (num_texts,), generator=generator),
    )


def test_exported_programs_equal_the_model_at_every_size(tmp_path):
    model = TCLForImageTextRetrieval(small_patches()).eval()
    programs = {}
    for name, program in export_programs(model).items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
        programs[name] = torch.export.load(tmp_path / f"{name}.pt2").module()
    for sizes in SIZES:
        pixel_values, input_ids, attention_mask, image_index = example(*sizes)
        image = programs["image_features"](pixel_values)
        text = programs["text_features"](input_ids, attention_mask)
        logits = programs["matching_logits"](text[1], attention_mask, image[1], image_index)
        expected = parts_by_hand(model, pixel_values, input_ids, attention_mask, image_index)
        for found, wanted in zip((image, text, logits), expected, strict=True):
            torch.testing.assert_close(list(found), wanted, rtol=1e-5, atol=1e-5)


def test_onnx_files_equal_the_model_at_every_size(run_snippet):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    found = run_snippet("ONNX and torch.export")
    image_embeds, text_embeds = features_of_photos_and_texts(["a red dog", "a big blue house near the tree", "a cat"])
    torch.testing.assert_close(torch.from_numpy(found["image_embeds"]), image_embeds[:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found["text_embeds"]), text_embeds, rtol=0, atol=1e-4)
    assert found["itm_logits"].shape == (3, 2)

    model = TCLForImageTextRetrieval.from_pretrained("runs/openmoji", use_momentum_teacher=False)
    for sizes in SIZES:
        pixel_values, input_ids, attention_mask, image_index = example(*sizes)
        mask = attention_mask.numpy()
        image = found["image_part"].run(None, {"pixel_values": pixel_values.numpy()})
        text = found["text_part"].run(None, {"input_ids": input_ids.numpy(), "attention_mask": mask})
        inputs = {"text_states": text[1], "attention_mask": mask, "image_states": image[1]}
        logits = found["matching_part"].run(None, inputs | {"image_index": image_index.numpy()})
        expected = parts_by_hand(model, pixel_values, input_ids, attention_mask, image_index)
        for part, wanted in zip((image, text, logits), expected, strict=True):
            torch.testing.assert_close([torch.from_numpy(x) for x in part], wanted, rtol=0, atol=1e-4)


def test_an_onnx_file_holds_every_part_of_a_vision_encoder(tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    fields = EVERY_VISION_PART | {"hidden_act": "quick_gelu"}
    model = TCLForImageTextRetrieval(small_patches(vision_config=fields)).eval()
    images, file = ({0: torch.export.Dim("images")},), tmp_path / "image_features.onnx"
    part = ImageFeatures(model).eval()
    torch.onnx.export(part, (torch.zeros(2, 3, 32, 32),), file, dynamic_shapes=images, verbose=False)
    session = onnxruntime.InferenceSession(file)
    for num_images in (1, 3):
        pixel_values = torch.randn(num_images, 3, 32, 32)
        with torch.no_grad():
            expected = model.tcl.get_image_features(pixel_values).pooler_output, model.tcl.encode_image(pixel_values)
        found = session.run(None, {"pixel_values": pixel_values.numpy()})
        for computed, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(computed), wanted, rtol=0, atol=1e-4)


def test_a_model_that_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no matching head"):
        export_onnx(TCLModel(small_patches()).eval(), tmp_path)
    with pytest.raises(ValueError, match="train mode"):
        export_programs(TCLForImageTextRetrieval(small_patches()).train())


# Embedding and search


def test_sentence_transformers_encode_as_the_model_does(run_snippet):
    package = pytest.importorskip("sentence_transformers", "6", reason="Sentence Transformers 6 is not installed")
    found = run_snippet("Sentence Transformers")
    images, texts = features_of_photos_and_texts(["a red dog", "a big house"])
    torch.testing.assert_close(torch.from_numpy(found["texts"]), texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["images"]), images[:2], rtol=0, atol=1e-5)

    long = "a red dog " * 30  # The processor cuts texts to 30 tokens.
    found["model"].save_pretrained("runs/sentences")
    reopened = package.SentenceTransformer("runs/sentences")
    _, expected = features_of_photos_and_texts([long])
    torch.testing.assert_close(torch.from_numpy(reopened.encode([long])), expected, rtol=0, atol=1e-5)


def test_faiss_finds_what_brute_force_finds(run_snippet):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    found = run_snippet("Search with Datasets and FAISS")
    images, texts = features_of_photos_and_texts(["a red dog"])
    scores, order = (images @ texts[0]).sort(descending=True)
    torch.testing.assert_close(torch.from_numpy(found["scores"]), scores[:3], rtol=0, atol=1e-5)
    names = [picture.filename for picture in found["photos"]["image"]]
    assert [Path(name).name for name in names] == [f"{number}.png" for number in range(NUM_PHOTOS)]
    assert [picture.filename for picture in found["found"]["image"]] == [names[row] for row in order[:3]]

    for row, embedding in enumerate(images.numpy()):
        nearest_scores, nearest = found["photos"].search("embedding", embedding, k=1)
        assert nearest.tolist() == [row]
        assert nearest_scores[0] == pytest.approx(1, abs=1e-5)
