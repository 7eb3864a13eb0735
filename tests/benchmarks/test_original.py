"""The comparison with the original code: its measurements and refusals, without the original itself."""

import copy
import sys

import original
import pytest
import torch
from helpers import small_patches
from torch import nn

import tcl_hf
from tcl_hf import TCLForPreTraining
from tcl_hf.sharing.convert import from_original


@pytest.fixture
def small_sizes(monkeypatch):
    """All works at a size that takes a second."""

    def config(**fields):
        text = {"vocab_size": 1100, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return small_patches(text_config=text, **fields)

    monkeypatch.setattr(tcl_hf, "TCLConfig", config)
    for name, value in {"IMAGES": 4, "TEXTS": 10, "K_RETRIEVAL": 3, "CANDIDATES": 30, "K_ANSWERS": 7}.items():
        monkeypatch.setattr(original, name, value)
    torch.manual_seed(0)


def test_values_must_be_those_of_the_original():
    theirs = {"mlm": 10.0, "image 0": [0.5, -0.5], "gradient temp": 100.0}
    assert original.largest_difference(theirs | {"more": 1.0}, theirs) == 0
    near = {"mlm": 10.00009, "image 0": [0.5, -0.500009], "gradient temp": 100.0099}
    assert original.largest_difference(near, theirs) == pytest.approx(9e-5, rel=1e-6)
    for changed in ({"mlm": 10.00011}, {"image 0": [0.5, -0.500011]}, {"gradient temp": 100.011}, {"mlm": torch.nan}):
        with pytest.raises(SystemExit, match=f"{next(iter(changed))} is"):
            original.largest_difference(near | changed, theirs)
    with pytest.raises(SystemExit, match="gives 'mlm' and ours does not"):
        original.largest_difference({}, theirs)


def test_times_are_medians_and_ratios_those_of_consecutive_runs():
    """By hand: the ratios are 2, 3 and 1. (The ratio of the medians would be 2 too, and that of the sums 15 / 7.)"""
    row = original.seconds_row("step", [4.0, 9.0, 2.0], [2.0, 3.0, 2.0], 1e-6)
    cells = "4.000 (2.000 to 9.000) | 2.000 (2.000 to 3.000) | 2.00 (1.00 to 3.00)"
    assert row == f"| step | {cells} | 1.0e-06 |"


def test_held_bytes_count_each_tensor_once():
    student = nn.Linear(3, 5)  # 20 numbers
    student.tied, student.teacher = student.weight, copy.deepcopy(student).requires_grad_(False)
    student.register_buffer("queue", torch.zeros(7, dtype=torch.long))
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    held = original.held_bytes(student, optimizer)
    steps = 2 * 4  # AdamW counts the steps of weight and bias
    assert held == {"weights": 80, "teacher": 80, "gradients": 80, "AdamW": 160 + steps, "queues": 56}


def test_activations_are_the_peak_less_what_is_held_and_a_peak_before_the_steps_is_refused():
    side = {"peak": 5 * 2**30, "before the steps": 2**30, "libraries": 2**30, "held": {"weights": 2 * 2**30}}
    rows = original.memory_rows(side, side | {"peak": 4.5 * 2**30})
    assert rows[2] == "| activations: peak less these | 3.000 | 2.500 | 0.83 |"
    assert rows[4] == "| activations without libraries | 2.000 | 1.500 | 0.75 |"
    with pytest.raises(SystemExit, match="peak of ours was reached before the steps"):
        original.memory_rows(side, side | {"before the steps": 5 * 2**30})


def test_our_step_is_compared_without_dropout_and_timed_with_it(small_sizes, tmp_path):
    work, twin = (torch.manual_seed(0) and original.OurStep(tmp_path / "work.pt") for _ in range(2))
    saved = torch.load(tmp_path / "work.pt")["model"]
    weights = from_original(saved, work.model.config)
    assert all(torch.equal(work.model.state_dict()[name], value) for name, value in weights.items())
    values = work.values()
    again = twin.values()  # with other random numbers, which must not matter
    assert values == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in again.items()}
    norms = {name.removeprefix("gradient ") for name in values if name.startswith("gradient ")}
    ours = from_original({name: torch.zeros(3) for name in norms}, work.model.config)
    named = work.model.named_parameters(remove_duplicate=False)
    assert ours.keys() == {name for name, value in named if value.requires_grad}
    losses = [work.model(**work.batch).loss_mlm.item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert isinstance(work.model, TCLForPreTraining)
    assert work.run(0)["seconds"] > 0
    assert work.held()["teacher"] == work.held()["weights"] - 4 * (1 + 2 * 32 + 2)  # no temperature, no matching head


def test_our_side_scores_ranks_and_encodes(small_sizes, tmp_path):
    scores = original.OurReranking(tmp_path / "a.pt").values()
    assert 4 * 3 <= len(scores) <= (4 + 10) * 3  # each pair once, whichever direction chose it
    answers = original.OurAnswers(tmp_path / "b.pt").values()
    assert len(answers) == 2 * 7
    for question in range(2):
        shares = [share for name, share in answers.items() if name.startswith(f"question {question}")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
    features = original.OurFeatures(tmp_path / "c.pt").values()
    assert len(features) == 8 + 32
    assert all(torch.tensor(row).norm().item() == pytest.approx(1, abs=1e-5) for row in features.values())


def test_a_folder_without_the_original_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["original.py", "--checkout", str(tmp_path)])
    with pytest.raises(SystemExit):
        original.main()
    assert "has no models/model_pretrain.py" in capsys.readouterr().err
