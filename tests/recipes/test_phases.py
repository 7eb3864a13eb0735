"""Phases: each starts from the model of the one before, an interrupted run goes on exactly, and mistakes are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import free_port, in_two_processes, losses, tiny, tiny_records, write_json

from tcl_hf import TCLConfig, TCLForPreTraining
from tcl_hf.cli import finetune, pretrain
from tcl_hf.models.processing_tcl import MAX_TOKENS
from tcl_hf.recipes.arguments import RecipeError
from tcl_hf.recipes.parsing import FINETUNE, PLAN, PRETRAIN, parse_recipe
from tcl_hf.recipes.phases import FINISHED, parse_phases
from tcl_hf.training.arguments import TrainingError
from tcl_hf.training.interruption import PREEMPTED
from tcl_hf.training.loop import TrainingRun

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
RECIPE = {
    "image_size": 16,
    "vocab_size": 60,
    "max_tokens": 8,
    "validation_split": "",
    "config": {
        "queue_size": 8,
        "projection_dim": 8,
        "vision_config": SIZES | {"num_hidden_layers": 2, "patch_size": 8},
        "text_config": SIZES | {"num_hidden_layers": 2, "fusion_layer": 1, "max_position_embeddings": 40},
    },
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
}
ALIGN = {"config": {"lock_text": True, "itm_weight": 0, "mlm_weight": 0}}
KEEP = {"learning_rate": 2.0e-3, "kept_views": 2, "config": {"lock_vision": True}}
UNLOCK = {"num_train_epochs": 2, "config": {"lock_vision": 1}}
PHASES = [ALIGN, KEEP, UNLOCK]
STEPS = [2, 2, 4]  # of 8 samples in batches of 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """A JSON list of eight pictures with captions."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for record in tiny_records(8):
        (folder / f"{record['image_id']}.png").write_bytes(record["image"]["bytes"])
        rows.append({"image": f"{record['image_id']}.png", "caption": record["captions"]})
    return write_json(folder, rows)


def write_recipe(folder: Path, data: str, phases, **changes) -> str:
    given = RECIPE | {"data": [data], "output_dir": str(folder / "run"), "kept_states_dir": str(folder / "states")}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(given | changes | ({} if phases is None else {"phases": phases}), sort_keys=False))
    return str(file)


def run(folder: Path, data: str, *argv: str, phases=PHASES, **changes) -> Path:
    AcceleratorState._reset_state(True)
    pretrain.main(["--recipe", write_recipe(folder, data, phases, **changes), *argv])
    return folder / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return TCLForPreTraining.from_pretrained(folder).state_dict()


def assert_equal(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run with three phases that was never stopped."""
    return run(tmp_path_factory.mktemp("whole"), data)


class Killed(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Stop a run after a step, counted over all phases, by a kill or by the signal of a scheduler."""

    def stop_after(step: int, kill: bool) -> None:
        real, taken = TrainingRun.after_step, []

        def after_step(self) -> None:
            taken.append(1)
            if len(taken) == step and not kill:
                self.stop_signal.ask()
            real(self)
            if len(taken) == step and kill:
                raise Killed

        monkeypatch.setattr(TrainingRun, "after_step", after_step)

    return stop_after


# Training


def test_phases_are_runs_that_start_from_each_other(whole, data, tmp_path):
    """The same runs by hand, each with all of its arguments."""
    hand = [tmp_path / f"by-hand-{number}" for number in range(3)]
    for number, changes in enumerate(PHASES):
        before = {"itm_weight": 1.0, "mlm_weight": 1.0, "lock_text": False}
        argv = ["--output_dir", str(hand[number])]
        if number:
            argv += ["--model", str(hand[number - 1]), "--config", json.dumps(before | changes["config"])]
        else:
            argv += ["--config", json.dumps(changes["config"])]
        changes = {name: value for name, value in changes.items() if name != "config"}
        run(tmp_path, data, *argv, phases=None, **changes)
    for folder, phase in zip(hand, (whole / "phase-1", whole / "phase-2", whole), strict=True):
        assert_equal(folder, phase)
    assert [len(losses(folder)) for folder in hand] == STEPS


def test_a_phase_trains_what_it_says_and_the_data_is_listed_once(whole):
    configs = [TCLConfig.from_pretrained(whole / name) for name in ("phase-1", "phase-2", "")]
    assert [(config.lock_text, config.lock_vision) for config in configs] == [(True, False), (False, True), (False, 1)]
    assert [(config.itm_weight, config.mlm_weight) for config in configs] == [(0, 0), (1, 1), (1, 1)]
    assert configs[-1].trained_on == [{"task": "pretraining", "data": ["rows"]}]
    first, second, third = (weights(whole / name) for name in ("phase-1", "phase-2", ""))
    vision, text = "tcl.vision_model.layers.0.fc1.weight", "tcl.text_model.layers.0.fc1.weight"
    assert torch.equal(first[vision], second[vision]) and torch.equal(second[vision], third[vision])
    assert not torch.equal(first[text], second[text])
    top = "tcl.vision_model.layers.1.fc1.weight"
    assert torch.equal(first[top], second[top]) and not torch.equal(second[top], third[top])


@pytest.mark.parametrize("kill", [True, False])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_was_stopped_in_any_phase_goes_on_bit_for_bit(
    whole, data, tmp_path, monkeypatch, stop_after, step, kill
):
    with monkeypatch.context() as patched:
        stop_after(step, kill)
        with pytest.raises((Killed, SystemExit)) as stopped:
            run(tmp_path, data, "--save_steps", "1")
        assert kill or stopped.value.code == PREEMPTED
        patched.undo()
    assert_equal(run(tmp_path, data, "--resume"), whole)
    assert losses(tmp_path / "run" / "phase-2") == losses(whole / "phase-2")


def test_a_run_that_is_asked_to_stop_at_the_end_of_a_phase_stops_there(whole, data, tmp_path, monkeypatch, stop_after):
    """A signal at the last step comes too late for a checkpoint: the phase is finished, the next one not begun."""
    with monkeypatch.context() as patched:
        stop_after(2, kill=False)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, data)
        assert stopped.value.code == PREEMPTED
        patched.undo()
    folder = tmp_path / "run"
    assert (folder / "phase-1" / FINISHED).exists() and not (folder / "phase-2").exists()
    assert_equal(run(tmp_path, data, "--resume"), whole)


def test_a_phase_without_a_checkpoint_starts_again(whole, data, tmp_path, monkeypatch, stop_after):
    with monkeypatch.context() as patched:
        stop_after(4, kill=True)
        with pytest.raises(Killed):
            run(tmp_path, data)
        patched.undo()
    folder = tmp_path / "run"
    time = (folder / "phase-1" / "model.safetensors").stat().st_mtime_ns
    assert_equal(run(tmp_path, data, "--resume", "--save_steps", "1", "--dataloader_num_workers", "1"), whole)
    assert (folder / "phase-1" / "model.safetensors").stat().st_mtime_ns == time


def test_the_card_of_a_run_names_its_phases_and_all_of_its_data(data, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    other = Path(data).with_name("other.json")
    shutil.copy(data, other)
    phases = [ALIGN | {"data": [str(other)]}, {"learning_rate": 2.0e-3}]
    options = {"validation_split": "train", "validation_data": [data], "eval_images": 4, "eval_k": 2}
    folder = run(tmp_path, data, phases=phases, **options)
    card = (folder / "README.md").read_text()
    config = '{"lock_text": true, "itm_weight": 0, "mlm_weight": 0}'
    assert f'1. `config: {config}`, `data: ["{other}"]`\n2. `learning_rate: 0.002`' in card
    assert "datasets:\n- other\n- rows\n" in card and "It was trained from scratch." in card
    assert not (folder / "phase-1" / "README.md").exists()
    trained_on = TCLConfig.from_pretrained(folder).trained_on
    assert trained_on == [{"task": "pretraining", "data": [name]} for name in ("other", "rows")]


def test_fields_that_a_phase_chose_become_those_of_the_checkpoint_again(data, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model, processor = tiny(TCLForPreTraining, momentum=0.9, trained_on=[{"task": "pretraining", "data": ["old"]}])
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    recipe = {"task": "retrieval", "num_train_epochs": 1, "per_device_train_batch_size": 4, "validation_split": ""}
    recipe["phases"] = [{"config": {"lock_text": True, "momentum": 0.5}}, {"seed": 3}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    AcceleratorState._reset_state(True)
    argv = ["--data", data, "--model", str(tmp_path / "start"), "--output_dir", str(tmp_path / "run")]
    finetune.main(["--recipe", str(tmp_path / "recipe.yaml"), *argv, "--dataloader_num_workers", "0"])
    first, last = (TCLConfig.from_pretrained(tmp_path / "run" / name) for name in ("phase-1", ""))
    assert (first.lock_text, first.momentum, last.lock_text, last.momentum) == (True, 0.5, False, 0.9)
    assert last.trained_on == [{"task": "pretraining", "data": ["old"]}, {"task": "retrieval", "data": ["rows"]}]
    assert "base_model:\n- start\n" in (tmp_path / "run" / "README.md").read_text()


def run_in_a_process(rank: int, recipes: list[str], ports: list[int]) -> None:
    """Three runs of a process: a whole one, one that a signal to one of the processes stops, and the rest of it."""
    real = TrainingRun.after_step

    def after_step(self) -> None:
        self.stop_signal.received = rank == 1 and self.is_done
        real(self)

    for number, (recipe, port) in enumerate(zip(recipes, ports, strict=True)):
        AcceleratorState._reset_state(True)
        os.environ["MASTER_PORT"] = str(port)
        TrainingRun.after_step = after_step if number == 1 else real
        if number != 1:
            pretrain.main(["--recipe", recipe, *["--resume"] * number])
            continue
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(["--recipe", recipe])
        assert stopped.value.code == PREEMPTED
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_decide_alike_and_train_every_phase_together(data, tmp_path):
    recipes = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        phases = [ALIGN, UNLOCK | {"kept_views": 2}]
        recipes.append(write_recipe(tmp_path / name, data, phases, per_device_train_batch_size=2))
    in_two_processes(run_in_a_process, [*recipes, recipes[1]], [free_port() for _ in range(3)])
    assert_equal(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")
    assert [len(losses(tmp_path / "whole" / "run" / name)) for name in ("phase-1", "")] == [2, 4]


# Going on


def test_a_finished_phase_that_was_changed_is_refused_and_kept(whole, data):
    changed = [ALIGN | {"num_train_epochs": 2}, KEEP, UNLOCK]
    file = whole / "phase-1" / FINISHED
    with pytest.raises(SystemExit, match=r"^error: All 3 phases in .*run are finished: choose another output_dir"):
        run(whole.parent, data, "--resume")
    (whole / FINISHED).rename(whole / "kept.json")
    before = file.stat().st_mtime_ns
    message = r"phases\[1\]: this phase is finished in .*phase-1, where {} was .*: set it as before to go on"
    with pytest.raises(SystemExit, match=message.format("num_train_epochs")):
        run(whole.parent, data, "--resume", phases=changed)
    changed = [{"config": {"lock_text": True, "itm_weight": 0.5}}, KEEP, UNLOCK]
    with pytest.raises(SystemExit, match=message.format("config.itm_weight")):
        run(whole.parent, data, "--resume", phases=changed)
    changed = [{"config": {"lock_text": True, "itm_weight": 0}}, KEEP, UNLOCK]
    with pytest.raises(SystemExit, match=message.format("config.mlm_weight")):
        run(whole.parent, data, "--resume", phases=changed)
    with pytest.raises(SystemExit, match=message.format("seed")):
        run(whole.parent, data, "--resume", "--seed", "3")
    (whole / "kept.json").rename(whole / FINISHED)
    content = json.loads(file.read_text())
    for settings in content["phases"]:
        del settings["plain_view"]  # as an earlier version wrote it, which did not have the argument
    file.write_text(json.dumps(content))
    (whole / FINISHED).rename(whole / "kept.json")
    with pytest.raises(SystemExit, match=message.format("seed")):
        run(whole.parent, data, "--resume", "--seed", "3")
    with pytest.raises(SystemExit, match=message.format("plain_view")):
        run(whole.parent, data, "--resume", "--plain_view", "true")
    (whole / "kept.json").rename(whole / FINISHED)
    before = file.stat().st_mtime_ns
    with pytest.raises(SystemExit, match="was written by a run with other phases"):
        run(whole.parent, data, "--resume", phases=[*PHASES, {}])
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["a finished phase", "a checkpoint"])
def test_a_run_does_not_overwrite_the_phases_of_another(data, tmp_path, left):
    folder = tmp_path / "run" / "phase-1"
    place = folder / FINISHED if left == "a finished phase" else folder / "checkpoints" / "step-00000001"
    place.mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"holds phases of an earlier run: go on with --resume, choose another"):
        run(tmp_path, data)


def test_phases_of_an_earlier_run_are_replaced_if_that_is_asked_for(whole, data, tmp_path):
    folder = tmp_path / "run"
    for place in (folder / "phase-1", folder):
        place.mkdir(parents=True, exist_ok=True)
        (place / FINISHED).write_text("{}")
        (place / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    (folder / "phase-2" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert_equal(run(tmp_path, data, "--overwrite_output_dir", "true"), whole)
    assert losses(folder) == losses(whole)


def test_a_run_does_not_replace_the_model_or_the_encoders_that_it_starts_from(data, tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    for name, source in (("model", tmp_path / "run"), ("vision_model", tmp_path / "run" / "encoder")):
        argv = ["--recipe", write_recipe(tmp_path, data, None), f"--{name}", str(source)]
        with pytest.raises(SystemExit, match=r"of the model that the run starts from, .*which would be lost"):
            pretrain.main([*argv, "--output_dir", str(tmp_path / "run"), "--overwrite_output_dir", "true"])


def test_checkpoints_of_a_phase_whose_start_is_not_finished_are_refused(data, tmp_path):
    (tmp_path / "run" / "phase-2" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"phase-2 holds checkpoints of phase 2, but phase 1 is not finished: remove"):
        run(tmp_path, data, "--resume")


def test_checkpoints_of_which_none_is_whole_are_named(data, tmp_path):
    (tmp_path / "run" / "phase-1" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no whole checkpoint to resume from in .*phase-1/checkpoints: remove this"):
        run(tmp_path, data, "--resume")


# Mistakes


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases is not a list of phases, but \[\]: write one item"),
        ({"learning_rate": 1.0}, "phases is not a list of phases, but {"),
        ([{}, 3], r"phases\[2\]: this is not a mapping of arguments, but 3"),
        ([{}, None], r"phases\[2\]: this is not a mapping of arguments, but None"),
        ([{}, {"batchsize": 3}], r"phases\[2\]: there is no argument 'batchsize' \(did you mean"),
        ([{"share_images": True}], r"phases\[1\]: share_images is read by finetune only"),
        ([{"queue_size": 3}], r"phases\[1\]: there is no argument 'queue_size' \(it is a field of the model"),
        ([{"phases": []}], r"phases\[1\]: there is no argument 'phases'"),
        ([{}, {"output_dir": "x"}], r"phases\[2\]: output_dir belongs to the whole run: set it outside the phases"),
        ([{"resume": True}], r"phases\[1\]: resume belongs to the whole run"),
        ([{"task": "retrieval"}], r"phases\[1\]: task belongs to the whole run"),
        ([{}, {"data": []}], r"phases\[2\]: data is empty: name sources, or leave it out"),
        ([{}, {"vision_model": "x"}], r"phases\[2\]: vision_model is read by the first phase only"),
        ([{}, {"model": "x"}], r"phases\[2\]: model is read by the first phase only"),
        ([{}, {"learning_rate": "much"}], r"phases\[2\]: .*learning_rate.*: invalid float value: 'much'"),
        ([{}, {"bf16": True, "fp16": True}], r"phases\[2\]: bf16 and fp16 are both true"),
        ([{}, {"config": {"quue_size": 3}}], r"phases\[2\]: config has no field 'quue_size'"),
        (
            [{}, {"config": {"lock_vision": "all"}}],
            r"phases\[2\]: config\.lock_vision is 'all': give a value of the type bool or int",
        ),
        ([{}, {"config": 5}], r"phases\[2\]: --config is not an object, but 5"),
        ([{}, {"config": {"projection_dim": 4}}], r"phases\[2\]: config\.projection_dim is a size of the model"),
        (
            [{}, {"config": {"text_config": {"hidden_size": 4}}}],
            r"phases\[2\]: config\.text_config\.hidden_size is a size",
        ),
        (
            [{"lora": {"r": 2}, "lora_save": "adapter"}] * 2,
            r"phases\[2\]: lora_save: adapters alone need a whole model to be added to, and the phase before saves ",
        ),
        (
            [{"config": {"text_config": {"hidden_dropout_prob": 0.0}}}, {}],
            r"phases\[1\]: config\.text_config\.hidden_dropout_prob is set for this phase and not for the next one",
        ),
    ],
)
def test_mistakes_in_phases_are_named(tmp_path, phases, message):
    with pytest.raises((RecipeError, TrainingError), match=rf"^{tmp_path}/recipe\.yaml: {message}"):
        parse_phases(PRETRAIN, ["--recipe", write_recipe(tmp_path, "rows.json", phases)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"lock_vision": 3}}, "lock_vision=3 locks layers that are not there, because the encoder has 2"),
        ({"config": {"momentum": 2}}, "momentum=2 is not a share"),
        ({"kept_views": 2}, "kept_views=2 keeps the states of locked layers, and lock_vision is false"),
        ({"image_size": 17}, "vision_config.image_size=17 does not divide"),
        (
            {"part_learning_rates": {"vision": 1e-5}, "config": {"lock_vision": True}},
            "this model trains no part 'vision'",
        ),
        (
            {"config": {f"{name}_weight": 0 for name in ("cma", "imc", "lmi", "itm", "mlm")} | {"lock_text": True}},
            "Nothing is trained: cma_weight, imc_weight, lmi_weight, itm_weight, mlm_weight are 0 and the locks are "
            "lock_text=True; give an objective",
        ),
    ],
)
def test_a_later_phase_that_cannot_be_trained_is_refused_before_the_first_one_is(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=rf"^error: .*phases\[2\]: .*{message}"):
        run(tmp_path, data, phases=[ALIGN, changes])
    assert not (tmp_path / "run").exists()


def with_heads(number: int = 8, **text_config) -> dict:
    """The config of a recipe whose fusion layer has this many heads, enough to multiply features or not."""
    config = RECIPE["config"]
    return config | {"text_config": config["text_config"] | {"num_attention_heads": number} | text_config}


def test_a_later_phase_starts_its_fusion_from_the_similarity(data, tmp_path):
    matching = {"itm_contrast": True, "cma_weight": 0, "imc_weight": 0, "lmi_weight": 0, "mlm_weight": 0}
    second = {"fusion_start": "similarity", "learning_rate": 1e-12, "config": {"lock_text": True} | matching}
    folder = run(tmp_path, data, phases=[ALIGN, second], config=with_heads(intermediate_size=64))
    outer = ["tcl.text_model.layers.1.fc2.weight", "teacher.tcl.text_model.layers.1.fc2.weight"]
    for name in outer:  # 24 units multiply 6 dimensions, and the others add nothing
        before, after = weights(folder / "phase-1")[name], weights(folder)[name]
        assert before[:, 24:].abs().min() > 0
        assert after[:, 24:].abs().max() < 1e-4 < 0.01 < after[:, :24].abs().max()


def test_what_a_recipe_names_outside_its_phases_starts_the_first_one_only(data, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(pretrain, "start_fusion", lambda data_args, model, *rest: started.append(model.name_or_path))
    options = {"fusion_start": "similarity", "config": with_heads()}
    run(tmp_path, data, phases=[{}, {"seed": 2}, {"fusion_start": "similarity"}], **options)
    assert started == ["", str(tmp_path / "run" / "phase-2")]  # a new model, and that of the second phase


@pytest.mark.parametrize("number", [1, 2])
def test_a_fusion_that_cannot_start_from_the_similarity_is_refused_before_anything_is_read(data, tmp_path, number):
    phases: list[dict] = [ALIGN if number == 2 else {}, {}]
    phases[number - 1] = {"fusion_start": "similarity", "kept_views": 1, "config": {"lock_vision": True}}
    with pytest.raises(SystemExit, match=r"error: .*fusion_start=similarity needs a wider fusion layer than one with"):
        run(tmp_path, data, phases=phases)
    assert not (tmp_path / "states").exists()
    assert not (tmp_path / "run").exists()


# Arguments


def test_the_command_line_wins_over_a_phase_and_a_phase_over_the_recipe(tmp_path):
    phases = [{"learning_rate": 2.0, "config": {"momentum": 0.5}}, {"config": {"alpha": 0.1}, "max_tokens": None}]
    recipe = write_recipe(tmp_path, "rows.json", phases)
    argv = ["--recipe", recipe, "--seed", "7", "--config", '{"alpha": 0.2}', "--output_dir", "elsewhere"]
    first, second = parse_phases(PRETRAIN, argv)
    assert (first.args.learning_rate, second.args.learning_rate) == (2.0, 1e-3)
    assert (first.args.seed, second.args.seed) == (7, 7)
    configs = [phase.model_args.config_fields for phase in (first, second)]
    assert [(one.get("momentum"), one["alpha"], one["queue_size"]) for one in configs] == [
        (0.5, 0.2, 8),
        (None, 0.2, 8),
    ]
    assert (first.data_args.max_tokens, second.data_args.max_tokens) == (8, MAX_TOKENS)
    assert (str(first.folder), str(second.folder)) == ("elsewhere/phase-1", "elsewhere")


def test_commands_that_do_not_train_pass_over_phases(tmp_path):
    recipe = write_recipe(tmp_path, "rows.json", PHASES)
    data, model, *_ = parse_recipe(PRETRAIN, ["--recipe", recipe])
    assert data.kept_views == 0 and "lock_text" not in model.config_fields
    assert [phase.data_args.kept_views for phase in parse_phases(PLAN, ["--recipe", recipe])] == [0, 2, 0]


@pytest.mark.parametrize("name", ["openmoji_scratch", "tcl_4m", "easy_vqa"])
def test_a_recipe_without_phases_is_its_own_only_phase(name):
    command = FINETUNE if name == "easy_vqa" else PRETRAIN
    (phase,) = parse_phases(command, ["--recipe", name])
    assert phase.arguments == parse_recipe(command, ["--recipe", name])
    assert phase.is_last and phase.history == "" and str(phase.folder) == phase.args.output_dir
