"""The engine of a run: Accelerate on one device or many, with DDP, FSDP2, DeepSpeed and compilation.

`Engine` keeps the differences between them out of the training loop. The functions below it let torch's FSDP2 shard a
model with its teacher, which `fully_shard` alone refuses or breaks. A sharded model holds a slice of every
weight, of the teacher's as of the student's, and gathers the weights of a layer while that layer is called. Queues are
buffers: each process holds them whole, and pushes the same rows.
"""

import importlib
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast,
    send_to_device,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..evaluation.shares import EvaluationStopped, stoppable
from ..models.distributed import whole
from ..models.encoders import TCLTextLayer, TCLVisionLayer
from .adapters import add_lora, save_adapted
from .agreement import Agreement
from .allocation import keep_freed_memory
from .arguments import TCLTrainingArguments, TrainingError
from .optimization import trained_groups
from .precision import mixed_precision_of
from .run_folder import replacing_model
from .states import (
    STATE_ERRORS,
    random_states,
    read_state,
    read_tensors,
    restore_optimizer,
    restore_random_states,
    tensors_of,
    write_state,
    write_tensors,
)

logger = logging.getLogger(__name__)

SHARDED_LAYERS = (TCLVisionLayer, TCLTextLayer)

# The files of a checkpoint, all of them safetensors. Processes that hold a part each write one each.
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
RUN = "run.safetensors"  # the states of everything else
RANDOM = "random-states.safetensors"

DEEPSPEED = "deepspeed"  # DeepSpeed's own folder in a checkpoint, with pickles
# What DeepSpeed puts into its pickles beside tensors and plain values: data without behaviour of its own.
_OF_DEEPSPEED = {
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


class Engine:
    """Runs the forward and backward passes of a model as the launcher and the arguments ask for them.

    Args:
        args: the arguments of the run.
    """

    def __init__(self, args: TCLTrainingArguments):
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision_of(args),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
            step_scheduler_with_optimizer=False,
            # Every process pushes the same keys, so that the queues need not be sent from rank 0 at each forward.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            # Each process reads its own batches: sending them from rank 0 fails where a batch has bad samples only.
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )
        self.agreement = Agreement()
        self.device = self.accelerator.device
        self.accumulation_steps: int = self.accelerator.gradient_accumulation_steps
        self._forwards = 0  # since the last optimizer step
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights or of the optimizer's state only."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def is_last_forward(self) -> bool:
        """Whether the present forward is the last one of its optimizer step."""
        return self.accelerator.sync_gradients

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the optimizer of a model, and fit both to the launcher; `model` stays usable under its own name.

        Raises:
            TrainingError: if nothing is trained, or the arguments ask for a part or a teacher that the model does not
                have.
        """
        args = self.args
        if args.lora is not None:
            if self.is_sharded:
                raise TrainingError(
                    "lora does not work with FSDP2 and DeepSpeed: launch with --multi_gpu (DDP), or leave it out."
                )
            add_lora(model, args)
        if args.average_weights:
            self._check_average(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        groups, self.rate_factors = trained_groups(model, args)
        optimizer = torch.optim.AdamW(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            fused=True,  # It reads `found_inf` on the device, see `UpdateGuard`.
        )
        if args.torch_compile:
            model.forward = torch.compile(model.forward)
        if self.is_sharded:
            make_shardable(model)  # Both engines fail on the scalar temperature.
        if self.accelerator.is_fsdp2:  # Else the temperature and the states between layers would be rounded to bf16.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # It is prepared without a loader.
            self.accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
                "gradient_clipping": args.max_grad_norm,
            }
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        gather_for_methods(model)
        for buffer in model.buffers():  # The queues start equal.
            broadcast(buffer)

    def _check_average(self, model: PreTrainedModel) -> None:
        """Refuse `average_weights` where the teacher cannot take the place of the student."""
        if getattr(model, "teacher", None) is None:
            raise TrainingError(
                f"average_weights needs a momentum teacher, which this {type(model).__name__} does not have: leave it "
                "out."
            )
        if any(hasattr(module, "get_base_layer") for module in model.modules()):
            raise TrainingError(
                "average_weights does not work with adapters, because the teacher averages the weights that they "
                "amount to and not the adapters: leave out one of the two."
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise TrainingError(
                "average_weights was not tried under DeepSpeed, which keeps copies of the weights: leave it out, or "
                "train with DDP or FSDP2."
            )

    def describe(self) -> dict[str, Any]:
        """Facts about the launch on which the result of a run depends."""
        return {
            "kind": self.accelerator.distributed_type.value,
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "accumulation": self.accumulation_steps,
            "device": self.device.type,
        }

    def save_state(self, folder: Path, states: dict[str, Any]) -> None:
        """Write the state of all processes into a folder; each of them has to call it.

        Args:
            states: further objects by name, of whose `state_dict` that of the main process is written.

        Raises:
            OSError, RuntimeError, SafetensorError: if a file cannot be written.
        """
        accelerator = self.accelerator
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model.save_checkpoint(str(folder), DEEPSPEED)
        else:
            tensors = tensors_of(accelerator.unwrap_model(self.model))
            if accelerator.is_main_process or self.is_sharded:
                write_tensors(self._own(folder / WEIGHTS), self._held(tensors))
                write_state(self._own(folder / OPTIMIZER), self.optimizer.state_dict())
        write_state(self._of_process(folder / RANDOM), random_states(self.device))
        if accelerator.is_main_process:
            content = {name: one.state_dict() for name, one in states.items()}
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            write_state(folder / RUN, {"states": content, "scaler": scaler, "forwards": accelerator.step})

    def load_state(self, folder: Path, states: dict[str, Any]) -> None:
        """Restore the state of all processes; no file of the folder is opened in a way that could execute it.

        Args:
            states: the objects whose states were written, by name.

        Raises:
            TrainingError: if a file cannot be used, or the optimizer has other groups of parameters.
        """
        try:
            self._load_weights(folder)
            run = read_state(folder / RUN)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(run["scaler"])
            self.accelerator.step = int(run["forwards"])
            content = send_to_device(run["states"], self.device)
            if content.keys() != states.keys():
                raise ValueError(f"{folder / RUN} holds the states of {', '.join(content)}")
            for name, one in states.items():
                one.load_state_dict(content[name])
            self._load_random_states(folder)
        except STATE_ERRORS as error:
            if isinstance(error, TrainingError):
                raise
            if "parameter group" in str(error):
                raise TrainingError(
                    f"{folder} has other groups of parameters: name the same parts in part_learning_rates as before, "
                    "train the same layers with the same decay_rule, and leave layer_decay at 1 or below 1 as it was."
                ) from error
            raise TrainingError(
                f"{folder} cannot be resumed: {error or type(error).__name__}. Remove it to go on from the checkpoint "
                "before it, or start a new run."
            ) from error

    def _load_weights(self, folder: Path) -> None:
        """Restore model and optimizer."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            check_pickles(folder / DEEPSPEED)
            self.model.load_checkpoint(str(folder), DEEPSPEED)
            return
        tensors = tensors_of(self.accelerator.unwrap_model(self.model))
        read_tensors(self._own(folder / WEIGHTS), self._held(tensors))
        for tensor in tensors.values():
            if self.is_sharded and not isinstance(tensor, DTensor):  # The main process alone has written it.
                broadcast(tensor.data)
        restore_optimizer(self.optimizer, read_state(self._own(folder / OPTIMIZER)))

    def _load_random_states(self, folder: Path) -> None:
        """Restore the generators of this process, or, where that is asked for, go on with those that there are."""
        file = self._of_process(folder / RANDOM)
        try:
            restore_random_states(read_state(file), self.device)
        except ValueError as error:
            if not self.args.ignore_random_states:
                raise TrainingError(
                    f"{file}: {error}. The run would not go on bit for bit: resume with --ignore_random_states true to "
                    "go on with other random numbers."
                ) from error
            logger.warning("%s: %s. The run goes on with other random numbers (ignore_random_states).", file, error)

    def _held(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that this process writes: all of them, or its parts; the main process also what is not cut."""
        if self.accelerator.is_main_process or not self.is_sharded:
            return tensors
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}

    def _own(self, file: Path) -> Path:
        """The file of this process where each holds a part, and else the one file of all."""
        return self._of_process(file) if self.is_sharded else file

    def _of_process(self, file: Path) -> Path:
        """The file with the number of this process in its name."""
        return file.with_stem(f"{file.stem}-{self.accelerator.process_index:05d}")

    def forward(self, batch: dict[str, Tensor], alpha: float) -> Any:
        """The model's output, with its losses; `alpha` is the share of the teacher's targets."""
        # A compiled forward takes a tensor, because each new number would compile it again.
        share = torch.full((), alpha, device=self.device) if self.args.torch_compile else alpha
        with self.accelerator.autocast():  # Accelerate leaves it out under FSDP2.
            return self.model(**batch, alpha=share)

    def backward(self, loss: Tensor) -> Tensor | None:
        """Compute gradients, and clip them at the last forward of an optimizer step.

        The gradient of a step is the mean over its forwards, of which the last step of an epoch may have fewer.

        Returns:
            The norm of the whole gradient before clipping; None before the last forward, and where DeepSpeed has none.
        """
        self.accelerator.backward(loss)
        self._forwards += 1
        if not self.is_last_forward:
            return None
        forwards, self._forwards = self._forwards, 0
        max_norm = self.args.max_grad_norm
        # With DeepSpeed, the call above has clipped and updated already.
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
            return None if norm is None else torch.tensor(float(norm), device=self.device)
        if forwards < self.accumulation_steps:  # At the end of an epoch. Each loss was divided by the whole number.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.accumulation_steps / forwards)
        if max_norm > 0:
            return whole(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm))
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def evaluate(
        self, evaluate: Callable[[nn.Module], dict[str, float]], is_asked_to_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Run an evaluation on the whole model, in the run's precision; all processes return from it together.

        Raises:
            EvaluationStopped: if it was asked to stop. Random numbers then go on as if it had not begun.
        """
        before = random_states(self.device)
        try:
            with self.result() as model, self.accelerator.autocast(), stoppable(is_asked_to_stop):
                metrics = evaluate(whole_model(model))
        except EvaluationStopped:
            restore_random_states(before, self.device)
            raise
        self.accelerator.wait_for_everyone()
        return metrics

    def save_model(self, folder: Path, processor: Any) -> None:
        """Save the whole model with its processor, by the main process."""
        self.accelerator.wait_for_everyone()
        with self.result() as model:
            state = whole_state_dict(model) if self.is_sharded else None  # Every process has to ask for it.
            if self.accelerator.is_main_process:
                with replacing_model(folder) as unfinished:
                    if self.args.lora is None:
                        model.save_pretrained(unfinished, state_dict=state)
                    else:
                        save_adapted(model, unfinished, self.args.lora_save)
                    processor.save_pretrained(unfinished)

    @contextmanager
    def result(self) -> Iterator[Any]:
        """The model as it is evaluated and saved; with `average_weights` its student has the teacher's weights.

        After the `with` block it has its own weights again, bit for bit.
        """
        model = self.accelerator.unwrap_model(self.model)
        with model.teacher.lending_weights_to(model) if self.args.average_weights else nullcontext():
            yield model


def check_pickles(folder: Path) -> None:
    """Refuse a folder of DeepSpeed's files if reading them could execute something, because DeepSpeed does not check.

    Torch's reader of weights interprets the same bytes, and knows nothing but tensors, plain values and four classes.

    Raises:
        ValueError: naming the file.
    """
    known = [
        getattr(importlib.import_module(module), name) for module, names in _OF_DEEPSPEED.items() for name in names
    ]
    with torch.serialization.safe_globals(known):
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pth", ".pkl")):
            try:
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, *STATE_ERRORS) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{file} holds more than tensors and plain values ({reason})") from error


# Sharding by FSDP2


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Shard a model in place over the processes of `mesh`, all of them if None, and return it.

    Every layer is a unit, and all that lies outside layers is one more. Build the optimizer afterwards. Accelerate
    shards by itself: it needs `make_shardable` before and `gather_for_methods` after.
    """
    make_shardable(model)
    for module in model.modules():
        if isinstance(module, SHARDED_LAYERS):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gather_for_methods(model)
    return model


def make_shardable(model: nn.Module) -> None:
    """Give scalar parameters one dimension, because they cannot be sharded; an optimizer that holds them keeps them."""
    for parameter in model.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data[None]


def gather_for_methods(model: nn.Module) -> None:
    """Let the layers of a sharded model gather their weights also where keys and values of images are made."""
    for module in model.modules():
        if isinstance(module, TCLTextLayer):
            register_fsdp_forward_method(module, "project_image")


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model as if it were not sharded, for `save_pretrained(..., state_dict=...)`.

    Every process has to ask for it. The first gets all of it in the memory of its CPU, and the others get nothing.
    """
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {name: _as_saved(name, value) for name, value in state.items()}


@torch.no_grad()
def whole_model(model: nn.Module) -> nn.Module:
    """A copy of a sharded model that is whole on every process, because evaluation calls its parts in any order.

    Every process has to ask for it. A model that is not sharded is returned as it is.
    """
    if not isinstance(model, FSDPModule):
        return model
    model_class: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        copy = model_class(model.config)
    copy.load_state_dict({name: _as_saved(name, whole(x)) for name, x in model.state_dict().items()}, assign=True)
    copy.tie_weights()
    return copy.train(model.training)


def _as_saved(name: str, value: Tensor) -> Tensor:
    """The temperature as the scalar that it was before `make_shardable`; other tensors as they are."""
    return value.squeeze(0) if name.rpartition(".")[2] == "temperature" else value
