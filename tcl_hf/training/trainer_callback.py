"""The callback that moves the momentum teacher in transformers' Trainer."""

from transformers import TrainerCallback


class TCLMomentumCallback(TrainerCallback):
    """Moves the momentum teacher once before each optimizer step of transformers' `Trainer`.

    It also raises alpha, the share of the teacher's targets, over the first epoch, as the paper does.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Move the teacher of `model`; see `transformers.TrainerCallback` for the arguments."""
        model = getattr(model, "module", model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the model.
        model.alpha = model.config.alpha * min(1.0, state.epoch or 0.0)
        model.update_teacher()
