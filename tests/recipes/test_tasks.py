"""The table of tasks: every row has what training and evaluation need."""

import pytest
from helpers import WORDS, labelled, phrases, questions, small_patches, statements, tiny_processor, tiny_records

from tcl_hf import TCLConfig
from tcl_hf.data.collators import TCLPreTrainingCollator, TCLTaskCollator
from tcl_hf.recipes.arguments import FinetuningDataArguments, PretrainingDataArguments
from tcl_hf.recipes.tasks import TASKS, ignored_options, readers_of

LONG = " ".join(WORDS * 3)  # longer than any limit
RECORDS = {
    "pretraining": [record | {"captions": [LONG]} for record in tiny_records(4)],
    "retrieval": [record | {"captions": [LONG]} for record in tiny_records(4)],
    "question_answering": [record | {"question": LONG} for record in questions(4)],
    "visual_entailment": [
        record | {"captions": [LONG]} for record in statements(("entailment", "neutral", "contradiction"))
    ],
    "visual_reasoning": [record | {"captions": [LONG]} for record in statements(("True", "False"), images=2)],
    "grounding": phrases(4),
    "classification": labelled([LONG, "red dog"]),
}
TRAINED = [name for name, task in TASKS.items() if task.batches is not None]


def arguments(task: str, **fields):
    if TASKS[task].is_downstream:
        return FinetuningDataArguments(task=task, **fields)
    return PretrainingDataArguments(**fields)


@pytest.mark.parametrize("name", TRAINED)
def test_every_task_has_what_training_needs(name):
    task = TASKS[name]
    collator = task.batches.collator(arguments(name), TCLConfig(), tiny_processor())
    assert isinstance(collator, TCLPreTrainingCollator if "two_views" in task.options else TCLTaskCollator)
    assert (task.evaluate is None) == ("eval_steps" not in task.options)


def test_a_task_without_training_is_evaluated():
    untrained = TASKS.keys() - set(TRAINED)
    assert untrained == {"classification"} and all(TASKS[name].evaluate for name in untrained)


def test_collators_mask_words_and_number_images_where_the_head_reads_them():
    collators = {
        name: task.batches.collator(arguments(name), TCLConfig(), tiny_processor())
        for name, task in TASKS.items()
        if "two_views" in task.options
    }
    masks = {name for name, collator in collators.items() if collator.mlm_probability}
    numbers = {name for name, collator in collators.items() if collator.with_image_ids}
    assert masks == {"pretraining"} and numbers == {"retrieval", "grounding"}
    unmasked = TASKS["pretraining"].batches.collator(
        arguments("pretraining"), TCLConfig(mlm_weight=0), tiny_processor()
    )
    assert unmasked.mlm_probability == 0


def test_collators_of_classes_read_labels_and_those_of_answers_do_not():
    config = TCLConfig()
    for name, label2id in (("visual_entailment", config.label2id), ("question_answering", None)):
        assert TASKS[name].batches.collator(arguments(name), config, tiny_processor()).label2id == label2id


@pytest.mark.parametrize(("name", "records"), RECORDS.items())
@pytest.mark.parametrize("limit", [None, 7])
def test_every_evaluation_cuts_texts_at_its_own_limit_and_not_at_that_of_training(name, records, limit):
    """`eval_max_tokens` is the limit; without it, it is 30 tokens, and 50 for questions."""
    task = TASKS[name]
    labels = {str(number): number for number in range(2)}
    if "label" in records[0]:
        labels = {label: number for number, label in enumerate(dict.fromkeys(r["label"] for r in records))}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64}
    id2label = {number: label for label, number in labels.items()}
    model = task.model_class(small_patches(text_config=ids, label2id=labels, id2label=id2label))
    lengths = []
    words = model.base_model.text_model.embeddings.word_embeddings
    words.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    args = arguments(name, max_tokens=4, eval_max_tokens=limit, eval_k=2)
    classes = ["red", "big cat"] if name == "question_answering" else list(labels)
    task.evaluate(model, tiny_processor(), records, args, classes)
    longest = {"question_answering": 50, "grounding": 10}.get(name, 30)  # no caption of a phrase is longer
    assert max(lengths) == (limit or longest)


def test_options_that_depend_on_the_task_are_those_of_its_parts():
    assert {"heat", "heat_layer", "two_views", "annotations", "validation_annotations"} <= TASKS["grounding"].options
    assert readers_of("answer_list") == ["question_answering"]
    assert readers_of("learning_rate") == []
    assert ignored_options("retrieval", ["heat", "eval_k", "learning_rate", "annotations"]) == ["annotations", "heat"]
