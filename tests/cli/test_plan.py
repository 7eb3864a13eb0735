"""The config of a planned model: nothing but the recipe is read."""

import pytest
from helpers import small_patches

from tcl_hf import TCLConfig
from tcl_hf.cli.plan import main, planned_config
from tcl_hf.recipes.arguments import ModelArguments, RecipeError


def test_encoders_count_at_the_sizes_of_the_config_and_else_at_the_paper_s():
    config = planned_config(ModelArguments(vision_model="not/read", text_model="not/read", fusion_layer=6))
    assert config.to_dict() == TCLConfig(vision_config={"image_size": 256}).to_dict()
    args = ModelArguments(
        image_size=32,
        vocab_size=99,
        fusion_layer=2,
        num_fusion_layers=3,
        config='{"queue_size": 8, "vision_config": {"patch_size": 8}, "text_config": {"hidden_size": 48}}',
    )
    config = planned_config(args)
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.queue_size) == (32, 8, 8)
    text = config.text_config
    assert (text.vocab_size, text.fusion_layer, text.num_hidden_layers, text.hidden_size) == (99, 2, 5, 48)


def test_a_checkpoint_counts_at_its_own_sizes(tmp_path):
    small_patches().save_pretrained(tmp_path)
    assert planned_config(ModelArguments(model=str(tmp_path))).text_config.hidden_size == 32


def test_a_checkpoint_that_does_not_exist_is_one_sentence():
    with pytest.raises(RecipeError, match=r"The model cannot be planned: .*nowhere"):
        planned_config(ModelArguments(model="./nowhere"))
    with pytest.raises(SystemExit, match=r"^error: The model cannot be planned"):
        main(["--model", "./nowhere"])


def test_the_config_of_a_plan_may_lock_layers_of_a_checkpoint(tmp_path):
    small_patches().save_pretrained(tmp_path)
    config = planned_config(ModelArguments(model=str(tmp_path), config='{"lock_vision": true, "projection_dim": 5}'))
    assert config.lock_vision is True and config.vision_config.lock is True
    assert config.projection_dim == 16  # the checkpoint's


def test_each_phase_has_a_plan_of_its_own(tmp_path, capsys):
    small_patches().save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}\nper_device_train_batch_size: 2\n"
        "phases: [{config: {itm_weight: 0}}, {kept_views: 2, config: {lock_vision: true}}]"
    )
    main(["--recipe", str(recipe)])
    first, second = capsys.readouterr().out.split("## Phase ")[1:]
    assert first.startswith('1 of 2: config: {"itm_weight": 0}\n') and "kept states" not in first
    assert second.startswith('2 of 2: kept_views: 2, config: {"lock_vision": true}\n') and "kept states" in second
    main(["--recipe", str(recipe), "--plain_view", "true", "--config", '{"lock_vision": true}'])
    first, second = capsys.readouterr().out.split("## Phase ")[1:]
    assert ": 1 views of" in first and ": 3 views of" in second
    recipe.write_text(f"model: {tmp_path}\nphases: [{{}}, {{kept_views: 2}}]")
    with pytest.raises(SystemExit, match=r"recipe\.yaml: phases\[2\]: kept_views=2 keeps the states of locked layers"):
        main(["--recipe", str(recipe)])


@pytest.mark.parametrize(("argv", "precision"), [([], "no"), (["--bf16", "true"], "bf16"), (["--fp16"], "fp16")])
def test_a_plan_is_in_float32_unless_half_precision_is_named(argv, precision, tmp_path, capsys):
    small_patches().save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--operations", *argv])
    printed = capsys.readouterr().out
    assert f"(mixed precision: {precision})" in printed and f"masked, mixed precision: {precision}:" in printed
