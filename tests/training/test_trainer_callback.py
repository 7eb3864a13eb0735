"""Our model, collator and callback in transformers' Trainer."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from helpers import small_patches, tiny_processor, tiny_records
from transformers import Trainer
from transformers import TrainingArguments as TrainerArguments

from tcl_hf import TCLForPreTraining
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.training.trainer_callback import TCLMomentumCallback


def test_transformers_trainer_trains_with_model_collator_and_callback(tmp_path, caplog):
    torch.manual_seed(0)
    model = TCLForPreTraining(small_patches())
    alphas = []

    class Watch(TCLMomentumCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            alphas.append(model.alpha)

    args = TrainerArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        eval_strategy="epoch",
    )
    data = Dataset.from_list(tiny_records(12))
    trainer = Trainer(
        model,
        args,
        data_collator=TCLPreTrainingCollator(tiny_processor()),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Watch()],
    )
    before = model.teacher.tcl.visual_projection.weight.clone()
    with caplog.at_level(logging.WARNING):
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and all(map(math.isfinite, logged))
    assert all(math.isfinite(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert not torch.equal(model.teacher.tcl.visual_projection.weight, before)
    assert alphas == pytest.approx([0, 0.2, 0.4, 0.4])
    assert not any("stands still" in record.message for record in caplog.records)
    trainer.save_model(tmp_path / "model")
    TCLForPreTraining.from_pretrained(tmp_path / "model")
