"""Heat maps equal the original's, phrases their tokens, and scores of boxes a slow loop."""

import random

import numpy as np
import pytest
import torch
from helpers import WORDS, small_patches, tiny_config, training_batch
from PIL import Image
from torch.nn import functional as F

from tcl_hf import (
    TCLForImageTextRetrieval,
    TCLForPreTraining,
    TCLImageProcessorPil,
    TCLModel,
    TCLProcessor,
    TCLTokenizer,
)
from tcl_hf.inference.grounding import (
    box_from_heat_map,
    box_scores,
    draw_heat_map,
    heat_point,
    matching_heat_map,
    phrase_heat_maps,
    phrase_map,
    phrase_span,
    phrase_tokens,
    rank_boxes,
    similarity_heat_map,
    sliding_boxes,
)
from tcl_hf.models.tokenization_tcl import clean_caption, clean_caption_with_origins

MAPS = {"matching": matching_heat_map, "similarity": similarity_heat_map}


@pytest.fixture
def original(golden):
    """A model with the original's weights, the original's inputs in our order, and its maps."""
    file = golden("gradcam")
    model = file.load(TCLForPreTraining(tiny_config())).eval()
    inputs = file["in"]
    return model, (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]), file["out"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TCLForImageTextRetrieval(small_patches(text_config={"fusion_layer": 1})).eval()


@pytest.fixture
def inputs():
    batch = training_batch(3)
    return batch["input_ids"], batch["attention_mask"], batch["pixel_values"]


def assert_maps_equal(computed, expected):
    """Equal up to 1e-4 of the maximum of each map."""
    assert computed.shape == expected.shape
    error = (computed - expected).abs().amax((-2, -1))
    assert (error <= 1e-4 * expected.amax((-2, -1))).all(), f"{error.max():g} off"


# Heat maps


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [2, 3])
def test_matching_maps_equal_the_original(original, layer, attention):
    model, pairs, expected = original
    model.set_attn_implementation(attention)
    maps = matching_heat_map(model, *pairs, layer=layer)
    assert_maps_equal(maps, expected[f"gradcam_itm_layer{layer}_per_token"])
    assert_maps_equal(maps.mean(1), expected[f"gradcam_itm_layer{layer}"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1])
def test_similarity_maps_equal_the_original(original, layer, attention):
    model, pairs, expected = original
    model.set_attn_implementation(attention)
    assert_maps_equal(similarity_heat_map(model, *pairs, layer=layer), expected[f"gradcam_itc_layer{layer}"])


def test_the_layer_of_similarity_counts_from_the_last_too_and_needs_no_head(original):
    model, pairs, expected = original
    assert_maps_equal(similarity_heat_map(model.tcl, *pairs), expected["gradcam_itc_layer1"])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_map_of_similarity_leaves_out_class_token_and_register_tokens(inputs, layer):
    """Against a loop over heads and patches: patch p is column 1 + 3 + p of the class token's attention."""
    torch.manual_seed(0)
    model = TCLModel(small_patches(vision_config={"num_register_tokens": 3})).eval()
    vision = model.vision_model(inputs[2], output_attentions=True)
    text = model.get_text_features(*inputs[:2]).pooler_output
    scores = (model.image_features(vision.last_hidden_state) * text).sum(-1) / model.temperature
    (gradients,) = torch.autograd.grad(scores.sum(), vision.attentions[layer])
    weights = vision.attentions[layer].detach()
    expected = torch.zeros(3, 4, 4)
    for n in range(3):
        for patch in range(16):
            for head in range(4):
                weight, gradient = weights[n, head, 0, 4 + patch], gradients[n, head, 0, 4 + patch]
                expected[n, patch // 4, patch % 4] += float(weight * max(gradient, 0) / 4)
    assert_maps_equal(similarity_heat_map(model, *inputs, layer=layer), expected)


@pytest.mark.parametrize(("num_layers", "fusion_layer", "chosen"), [(12, 6, 8), (4, 1, 2), (4, 2, 2), (4, 3, 3)])
def test_the_layer_of_matching_is_the_lower_middle_of_the_fusion_layers(inputs, num_layers, fusion_layer, chosen):
    config = small_patches(text_config={"num_hidden_layers": num_layers, "fusion_layer": fusion_layer})
    model = TCLForImageTextRetrieval(config).eval()
    assert torch.equal(matching_heat_map(model, *inputs), matching_heat_map(model, *inputs, layer=chosen))


def test_in_the_last_layer_only_the_class_token_has_a_map(model, inputs):
    maps = matching_heat_map(model, *inputs, layer=3)
    assert maps[:, 0].any() and not maps[:, 1:].any()
    assert matching_heat_map(model, *inputs, layer=2)[:, 1].any()


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_parameters_and_callers_without_gradients_change_no_map(model, inputs, kind, context):
    expected = MAPS[kind](model, *inputs)
    model.requires_grad_(False)
    with context():
        mode = torch.is_grad_enabled()
        copies = [x.clone() for x in inputs]
        maps = MAPS[kind](model, *copies)
        assert torch.is_grad_enabled() == mode
    assert torch.equal(maps, expected)
    assert not maps.requires_grad and maps.dtype == torch.float32


@pytest.mark.parametrize("kind", MAPS)
def test_modes_gradients_and_hooks_are_left_as_they_were(inputs, kind):
    config = small_patches(text_config={"hidden_dropout_prob": 0.5})
    model = TCLForImageTextRetrieval(config).train()
    model.tcl.vision_model.eval()
    model.itm_head.weight.grad = torch.ones_like(model.itm_head.weight)
    modes = [module.training for module in model.modules()]
    maps = MAPS[kind](model, *inputs)
    with pytest.raises(ValueError, match="layer=17"):
        MAPS[kind](model, *inputs, layer=17)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (model.itm_head.weight.grad == 1).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "itm_head.weight")
    assert torch.equal(maps, MAPS[kind](model.eval(), *inputs))  # dropout was off


def test_the_graph_begins_at_the_chosen_layer(model, inputs):
    """Earlier layers keep no activations, although their parameters require gradients."""
    seen = {}
    layers = model.tcl.text_model.layers
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, out, n=number: seen.update({n: out[0].requires_grad}))
    matching_heat_map(model, *inputs, layer=2)
    assert seen == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize("kind", MAPS)
def test_a_pair_has_the_same_map_alone_as_in_a_batch(model, inputs, kind):
    together = MAPS[kind](model, *inputs)
    for row, length in enumerate(inputs[1].sum(1).tolist()):
        ids, mask, pixels = (x[row : row + 1] for x in inputs)
        alone = MAPS[kind](model, ids[:, :length], mask[:, :length], pixels)[0]
        if kind == "matching":
            assert not together[row, length:].any()
            assert_maps_equal(together[row, :length], alone)
        else:
            assert_maps_equal(together[row], alone)


@pytest.mark.parametrize("kind", MAPS)
def test_a_missing_mask_means_that_all_are_tokens(model, inputs, kind):
    ids, _, pixels = inputs
    assert torch.equal(MAPS[kind](model, ids, None, pixels), MAPS[kind](model, ids, torch.ones_like(ids), pixels))


@pytest.mark.parametrize("kind", MAPS)
def test_images_that_are_not_square_have_maps_of_their_grid(model, inputs, kind):
    ids, mask, _ = inputs
    pixels = torch.randn(3, 3, 40, 16)
    maps = MAPS[kind](model, ids, mask, pixels, interpolate_pos_encoding=True)
    assert maps.shape[-2:] == (5, 2)


@pytest.mark.parametrize("kind", MAPS)
def test_bfloat16_maps_are_close(model, inputs, kind):
    expected = MAPS[kind](model, *inputs)
    maps = MAPS[kind](model.to(torch.bfloat16), *inputs)
    assert maps.dtype == torch.float32
    assert (maps - expected).abs().max() < 0.1 * expected.max()


@pytest.mark.parametrize("kind", MAPS)
def test_images_and_texts_must_be_pairs(model, inputs, kind):
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        MAPS[kind](model, inputs[0], inputs[1], inputs[2][:2])


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_only_fusion_layers_have_matching_maps(model, inputs, layer):
    with pytest.raises(ValueError, match=rf"layer={layer} is not a fusion layer: choose one of \[1, 2, 3\]"):
        matching_heat_map(model, *inputs, layer=layer)


def test_a_model_without_fusion_layers_has_no_matching_maps(inputs):
    config = small_patches(text_config={"fusion_layer": 4}, itm_weight=0.0, mlm_weight=0.0)
    with pytest.raises(ValueError, match="no fusion layers"):
        matching_heat_map(TCLForImageTextRetrieval(config), *inputs)
    assert similarity_heat_map(TCLModel(config), *inputs).shape == (3, 4, 4)


# Phrases


@pytest.fixture(scope="module")
def processor():
    """A processor whose vocabulary has every word of the tests, some of them only in pieces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "t", "##shi", "##rt", "##s", "i", "cafe", "person"]
    tokenizer = TCLTokenizer({word: number for number, word in enumerate(words)})
    return TCLProcessor(TCLImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


def words_of(processor, caption, phrase, **kwargs) -> list[str]:
    """The tokens of a phrase, looked up in the ids that the processor makes of its caption."""
    tokens = phrase_tokens(processor, caption, *phrase_span(caption, phrase), **kwargs)
    ids = processor(text=caption, max_length=kwargs.get("max_length", 30))["input_ids"]
    assert tokens.dtype == torch.bool and len(tokens) == len(ids)
    return processor.tokenizer.convert_ids_to_tokens(np.array(ids)[tokens.numpy()].tolist())


@pytest.mark.parametrize(
    ("caption", "phrase", "expected"),
    [
        ("a red dog runs", "red dog", ["red", "dog"]),
        ("A Red, big  DOG (runs)!", "red, big  dog", ["red", "big", "dog"]),
        ("...a dog.", "dog.", ["dog"]),
        ("the dog's house", "dog's", ["dog", "##s"]),
        ("the dog's house", "dog", ["dog"]),
        ("the dog's house", "s", ["##s"]),
        ("a red-green t-shirt/car", "t-shirt", ["t", "[UNK]"]),
        ("a red-green tshirt", "tshirt", ["t", "##shi", "##rt"]),
        ("a red-green tshirt", "shi", ["##shi"]),
        ("a red-green tshirt", "green", ["green"]),
        ("  \t a \n\n dog  - cat ", "cat", ["cat"]),
        ("  \t a \n\n dog  - cat ", "dog  - cat", ["dog", "cat"]),
        ("near <person> and <person>", "<person>", ["person"]),
        ("the (small) CAFÉ", "café", ["cafe"]),
        ("İ İ dog", "dog", ["dog"]),  # each lower-cases to two characters
        ("the 犬 runs", "犬", ["[UNK]"]),
    ],
)
def test_a_phrase_finds_its_tokens(processor, caption, phrase, expected):
    assert words_of(processor, caption, phrase) == expected


def test_every_token_belongs_to_the_word_that_it_was_made_of(processor):
    """In captions of random words and punctuation, a word has the tokens that it has alone, at its place."""
    rng = random.Random(0)
    for _ in range(200):
        pieces, spans, position = [], [], 0
        for _ in range(rng.randint(1, 12)):
            word = rng.choice([*WORDS, "tshirt", "İ", "Café", "dogs"])
            word = rng.choice([word, word.upper(), word[0] + "'" + word[1:]])
            spans.append((position, position + len(word)))
            pieces += [word, rng.choice([" ", "  ", " - ", "/", ", ", "!? ", "\t\n"])]
            position += len(word) + len(pieces[-1])
        caption = "".join(pieces)
        ids = processor(text=caption, max_length=100)["input_ids"]
        expected = 1  # after [CLS]
        for start, end in spans:
            alone = processor(text=caption[start:end])["input_ids"][1:]
            places = phrase_tokens(processor, caption, start, end, max_length=100).nonzero().flatten().tolist()
            assert places == list(range(expected, expected + len(alone)))
            assert [ids[place] for place in places] == alone
            expected += len(alone)
        assert expected == len(ids)


def test_a_phrase_is_found_at_its_first_place_as_a_word():
    caption = "A scattered Cat, a cat"
    assert phrase_span(caption, "cat") == (12, 15)
    assert phrase_span(caption, "catt") == (3, 7)
    assert phrase_span("İ (big) dog?", "(BIG) dog?") == (2, 12)
    for phrase in ("horse", ""):
        with pytest.raises(ValueError, match=f"'{phrase}' does not occur in 'A scattered Cat"):
            phrase_span(caption, phrase)


def test_a_phrase_that_is_cut_off_is_refused(processor):
    caption = "the " * 29 + "red-dog sits"
    assert words_of(processor, caption, "red", max_length=40) == ["red"]
    for phrase in ("dog", "red-dog", "sits"):
        with pytest.raises(ValueError, match=r"does not read all of .* first 30 words and 40 tokens"):
            words_of(processor, caption, phrase, max_length=40)
    with pytest.raises(ValueError, match="first 30 words and 30 tokens"):  # [CLS] takes one
        words_of(processor, caption, "red")
    assert words_of(processor, "a red dog", "red", max_length=3) == ["red"]
    with pytest.raises(ValueError, match="does not read all of 'red dog', characters 2 to 9"):
        words_of(processor, "a red dog", "red dog", max_length=3)


@pytest.mark.parametrize("span", [(3, 3), (4, 3), (-1, 2), (0, 8), (20, 22)])
def test_a_span_outside_the_caption_is_refused(processor, span):
    with pytest.raises(ValueError, match=rf"span {span[0]} to {span[1]} .* 7 characters of 'a dog!!'"):
        phrase_tokens(processor, "a dog!!", *span)


def test_a_phrase_of_deleted_characters_is_refused(processor):
    for span in ((5, 7), (1, 2)):
        with pytest.raises(ValueError, match="The tokenizer reads nothing"):
            phrase_tokens(processor, "a dog!!", *span)


def test_a_processor_that_does_not_clean_is_followed(processor):
    processor = TCLProcessor(processor.image_processor, processor.tokenizer, clean_text=False)
    assert words_of(processor, "dog, cat", "dog, cat") == ["dog", "[UNK]", "cat"]
    assert words_of(processor, "dog, cat", "cat") == ["cat"]


def test_marks_are_as_long_as_the_padded_batch(processor):
    captions = ["a red dog", "the big cat sits on the car"]
    length = processor(text=captions, return_tensors="pt")["input_ids"].shape[1]
    tokens = phrase_tokens(processor, captions[0], 2, 9, length=length)
    assert tokens.tolist() == [False, False, True, True, False, False, False, False]
    with pytest.raises(ValueError, match="length=3 is less than the 4 tokens"):
        phrase_tokens(processor, captions[0], 2, 9, length=3)


def test_a_separator_at_the_end_belongs_to_no_phrase():
    tokenizer = TCLTokenizer(
        {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "dog": 5}, add_sep_token=True
    )
    processor = TCLProcessor(TCLImageProcessorPil(), tokenizer)
    assert phrase_tokens(processor, "dog", 0, 3).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="does not read all"):
        phrase_tokens(processor, "dog dog", 0, 7, max_length=3)


def test_a_phrase_has_the_mean_of_its_tokens_maps():
    maps = torch.rand(4, 2, 3)
    tokens = torch.tensor([[False, True, False, True], [True, False, False, False]])
    expected = torch.stack([(maps[1] + maps[3]) / 2, maps[0]])
    torch.testing.assert_close(phrase_map(maps, tokens), expected, rtol=0, atol=1e-7)
    of_two_texts = phrase_map(torch.stack([maps, 2 * maps]), tokens)
    torch.testing.assert_close(of_two_texts, expected * torch.tensor([1.0, 2.0])[:, None, None], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="among 3 tokens, but there are maps of 4"):
        phrase_map(maps, tokens[:, :3])
    with pytest.raises(ValueError, match="no token"):
        phrase_map(maps, torch.zeros(4, dtype=torch.bool))


# From phrases to heat maps


@pytest.mark.parametrize("heat", MAPS)
@pytest.mark.parametrize("layer", [None, 1])
def test_maps_of_phrases_equal_those_of_each_phrase_alone(model, processor, heat, layer):
    """Matching reads the caption and marks tokens; similarity reads the phrase. Without a span the caption is read."""
    captions = ["a red dog runs", "The big cat, near the (small) car!"]
    spans = [[(2, 9)], [(4, 11), None, (22, 33)]]
    pixels = torch.randn(2, 3, 32, 32)
    found = phrase_heat_maps(model, processor, pixels, captions, spans, heat, layer)
    asked = {} if layer is None else {"layer": layer}
    assert [len(maps) for maps in found] == [1, 3]
    for row, (caption, of_caption) in enumerate(zip(captions, spans, strict=True)):
        for span, heat_map in zip(of_caption, found[row], strict=True):
            text = caption if span is None or heat == "matching" else caption[slice(*span)]
            inputs = processor(text=[text], return_tensors="pt")
            expected = MAPS[heat](model, **inputs, pixel_values=pixels[row : row + 1], **asked)[0]
            if heat == "matching":
                marked = expected if span is None else expected[phrase_tokens(processor, caption, *span)]
                expected = sum(marked) / len(marked)
            assert_maps_equal(heat_map, expected)


@pytest.mark.parametrize("heat", MAPS)
def test_phrases_that_are_not_read_are_refused_or_skipped(model, processor, heat):
    captions, pixels = ["a dog!!", "the " * 29 + "red dog"], torch.randn(2, 3, 32, 32)
    for span, message in (((5, 7), "The tokenizer reads nothing of '!!'"), ((3, 9), "span 3 to 9 is empty or outside")):
        with pytest.raises(ValueError, match=message):
            phrase_heat_maps(model, processor, pixels[:1], captions[:1], [[span]], heat)
    spans = [[(5, 7), (2, 5)], [(120, 123)]]
    maps = phrase_heat_maps(model, processor, pixels, captions, spans, heat, skip_unread=True)
    # The tokens of the second caption's phrase are cut off, unless the phrase is a text alone.
    assert [[heat_map is not None for heat_map in of_caption] for of_caption in maps] == [
        [False, True],
        [heat == "similarity"],
    ]
    assert phrase_heat_maps(model, processor, pixels, captions, [[], []], heat) == [[], []]


# The clean-up of captions


def random_captions(number: int) -> list[str]:
    rng = random.Random(1)
    pieces = [
        *",.'!?\"()*#:;~-/<> \t\n  aZ",
        "\u00a0",
        "\u2003",
        "İ",
        "Σ",
        "ß",
        "é",
        "e\u0301",
        "犬",
        "<person>",
        "dog",
        " ",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 25))) for _ in range(number)]


def test_origins_come_with_the_cleaned_caption():
    for caption in random_captions(3000):
        for max_words in (2, 30):
            cleaned, origins = clean_caption_with_origins(caption, max_words)
            assert cleaned == clean_caption(caption, max_words)
            assert len(origins) == len(cleaned)
            assert origins == sorted(origins)
            for char, origin in zip(cleaned, origins, strict=True):
                if char == " ":
                    assert caption[origin] in "-/" or caption[origin].isspace()
                else:
                    assert char in caption[origin].lower() or (char, caption[origin]) == ("ς", "Σ")


def test_only_characters_that_the_clean_up_deletes_lack_a_place():
    for caption in random_captions(1000):
        _, origins = clean_caption_with_origins(caption, max_words=100)
        lost = {char for place, char in enumerate(caption) if place not in origins}
        assert all(char in ",.'!?\"()*#:;~<>-/" or char.isspace() for char in lost)


# Boxes


def slow_scores(heat_map, boxes, image_size):
    """Score boxes as the original does, which has them as x, y, width, height."""
    image = F.interpolate(heat_map[None, None], size=image_size[::-1], mode="bicubic")[0, 0].double()
    scores = []
    for x, y, width, height in boxes:
        total = 0.0
        for row in range(int(y), int(y + height)):
            for column in range(int(x), int(x + width)):
                total += float(image[row, column])
        scores.append(total / (width * height) ** 0.5)
    return scores


def test_box_scores_equal_a_slow_loop():
    rng = np.random.default_rng(0)
    heat_map = torch.rand(4, 6)
    image_size = (37, 23)
    boxes = [[0, 0, 37, 23], [3.9, 2.2, 10.05, 7.99], [36, 22, 1, 1], [5.2, 5.2, 0.5, 9.0]]
    for _ in range(20):
        x, y = rng.uniform(0, 30), rng.uniform(0, 18)
        boxes.append([x, y, rng.uniform(0.1, 37 - x), rng.uniform(0.1, 23 - y)])
    expected = torch.tensor(slow_scores(heat_map, boxes, image_size))
    corners = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    scores = box_scores(heat_map, corners, image_size)
    torch.testing.assert_close(scores, expected.float(), rtol=1e-5, atol=1e-6)
    assert scores[3] == 0  # between two pixels
    as_tensor = torch.tensor(corners, dtype=torch.float64)
    assert torch.equal(box_scores(heat_map, as_tensor, image_size), scores)
    assert rank_boxes(heat_map, corners, image_size).tolist() == sorted(range(24), key=lambda i: -scores[i])


def test_box_scores_of_an_even_map_are_the_roots_of_the_areas():
    scores = box_scores(torch.ones(3, 3), [[0, 0, 4, 4], [2, 1, 5, 4], [1, 1, 17, 5]], (20, 10))
    torch.testing.assert_close(scores, torch.tensor([4.0, 3.0, 8.0]), rtol=1e-5, atol=0)


def test_equal_boxes_keep_their_order():
    assert rank_boxes(torch.ones(2, 2), [[0, 0, 2, 2], [0, 0, 9, 9], [0, 0, 9, 9]], (9, 9)).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -2, 5, 5), (0, 0, 21, 5), (0, 0, 5, 11), (3, 0, 3, 5), (0, 5, 5, 2), (0, 0, float("nan"), 5)],
)
def test_boxes_outside_the_image_or_without_area_are_refused(box):
    with pytest.raises(ValueError, match=r"boxes\[1\] = \[.*\] has no area or leaves the image of 20 x 10"):
        box_scores(torch.ones(2, 2), [(0, 0, 1, 1), box], (20, 10))
    with pytest.raises(ValueError, match=r"boxes\[0\]"):
        draw_heat_map(Image.new("RGB", (20, 10)), torch.ones(2, 2), [box])


def test_maps_and_boxes_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"heat_map has the shape \(1, 2, 2\)"):
        heat_point(torch.ones(1, 2, 2), (20, 10))
    with pytest.raises(ValueError, match=r"boxes have the shape \(1, 3\)"):
        box_scores(torch.ones(2, 2), [[0, 0, 1]], (20, 10))
    with pytest.raises(ValueError, match=r"image_size=\(20, 0\) has no pixels"):
        sliding_boxes((20, 0))
    assert box_scores(torch.ones(2, 2), [], (20, 10)).shape == (0,)


@pytest.mark.parametrize("image_size", [(500, 375), (375, 500), (1000, 40), (3, 2), (1, 1)])
def test_sliding_boxes_cover_the_image_without_repeats(image_size):
    boxes = sliding_boxes(image_size)
    width, height = image_size
    box_scores(torch.ones(2, 2), boxes, image_size)  # all lie inside
    assert len(boxes.unique(dim=0)) == len(boxes)
    assert torch.equal(boxes, boxes.round())
    assert boxes.amin(0)[:2].tolist() == [0, 0] and boxes.amax(0)[2:].tolist() == [width, height]
    assert torch.equal(boxes, sliding_boxes(image_size))


def test_sliding_boxes_hold_one_close_to_any_box():
    """Random boxes of common sizes and shapes, at any place, have an IoU of at least 0.5 with one of them."""
    rng = np.random.default_rng(0)
    width, height = 500, 375
    boxes = sliding_boxes((width, height))
    assert len(boxes) < 3000
    for _ in range(100):
        side, ratio = rng.uniform(0.15, 0.85) * (width * height) ** 0.5, rng.uniform(0.6, 1.7)
        w, h = min(side * ratio**0.5, width), min(side / ratio**0.5, height)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        across = (boxes[:, 2].clamp(max=x + w) - boxes[:, 0].clamp(min=x)).clamp(min=0)
        down = (boxes[:, 3].clamp(max=y + h) - boxes[:, 1].clamp(min=y)).clamp(min=0)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert (across * down / (areas + w * h - across * down)).max() >= 0.5


# Points, regions, pictures


def test_the_point_lies_in_the_middle_of_the_hottest_pixel():
    heat_map = torch.zeros(3, 4)
    heat_map[2, 1] = 1
    assert heat_point(heat_map, (4, 3)) == (1.5, 2.5)
    x, y = heat_point(heat_map, (400, 300))
    assert 100 < x < 200 and 200 < y < 300
    assert heat_point(torch.zeros(3, 4), (400, 300)) == (200, 150)


def slow_region(hot, row, column):
    """Find the pixels that connect to one by visiting its neighbours."""
    seen, waiting = set(), [(row, column)]
    while waiting:
        y, x = waiting.pop()
        if (y, x) not in seen and 0 <= y < hot.shape[0] and 0 <= x < hot.shape[1] and hot[y, x]:
            seen.add((y, x))
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return seen


@pytest.mark.parametrize("seed", range(20))
def test_the_box_of_a_map_surrounds_the_region_of_its_maximum(seed):
    height, width = 9, 13
    generator = torch.Generator().manual_seed(seed)
    heat_map = torch.rand(height, width, generator=generator)
    threshold = 0.3 + 0.02 * seed
    row, column = divmod(int(heat_map.argmax()), width)
    region = slow_region(heat_map >= threshold * heat_map.max(), row, column)
    rows, columns = {y for y, _ in region}, {x for _, x in region}
    expected = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
    assert box_from_heat_map(heat_map, (width, height), threshold) == expected


def test_the_box_of_a_map_follows_winding_regions_but_not_across_corners():
    winding = ["#####", "....#", "#####", "#....", "####.", "....#"]
    heat_map = torch.tensor([[char == "#" for char in row] for row in winding]).float()
    heat_map[0, 0] = 1.1
    assert box_from_heat_map(heat_map, (5, 6)) == (0, 0, 5, 5)


def test_the_box_of_a_map_is_in_pixels_of_the_image():
    heat_map = torch.zeros(4, 4)
    heat_map[1, 2] = 1
    x1, y1, x2, y2 = box_from_heat_map(heat_map, (400, 200))
    assert 180 < x1 < 220 < 280 < x2 < 320 and 40 < y1 < 60 < 90 < y2 < 110
    assert box_from_heat_map(torch.zeros(4, 4), (40, 20)) == (0, 0, 40, 20)
    for threshold in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"threshold={threshold}"):
            box_from_heat_map(heat_map, (40, 20), threshold)


def test_a_picture_is_red_where_it_is_hot_and_has_green_boxes():
    heat_map = torch.zeros(4, 4)
    heat_map[0, 0] = 1
    image = Image.new("L", (80, 40), 100)
    drawn = draw_heat_map(image, heat_map, [(40, 20, 60, 30)])
    assert drawn.size == image.size and drawn.mode == "RGB" and image.getpixel((0, 0)) == 100
    red, green, blue = drawn.getpixel((5, 2))
    assert red > 180 and green == blue < 60
    assert drawn.getpixel((70, 35)) == (100, 100, 100)
    assert {drawn.getpixel(p) for p in [(40, 20), (59, 29), (50, 20), (40, 25)]} == {(0, 255, 0)}
    assert drawn.getpixel((60, 30)) == drawn.getpixel((50, 25)) == (100, 100, 100)
    cold = draw_heat_map(image, torch.zeros(4, 4), torch.empty(0, 4))
    assert list(cold.convert("L").getdata()) == list(image.getdata())
