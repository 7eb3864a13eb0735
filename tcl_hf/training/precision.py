"""The precision of forward passes, on the hardware that is there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.utils import logging

from .agreement import processes
from .arguments import TCLTrainingArguments

logger: Any = logging.get_logger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # Intel and AMD, and then ARM


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies numbers of bfloat16 itself; true where PyTorch cannot say (before version 2.10)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is None or any(capabilities().get(name) for name in BFLOAT16_INSTRUCTIONS)


def mixed_precision_of(args: TCLTrainingArguments) -> str | None:
    """The precision that the arguments ask for, in Accelerate's words; None for that of the launcher.

    It is "no" in place of "bf16" on a CPU without instructions for bfloat16, where PyTorch computes in float32 and
    converts every operand: several times slower, and less exact. A warning says so once.
    """
    if not args.bf16 or processes().device.type != "cpu" or cpu_has_bfloat16():
        return args.mixed_precision
    if processes().is_main_process:
        logger.warning_once(
            "bf16=true: this CPU has no instructions for bfloat16, which makes float32 several times faster, and so "
            "the run computes in float32."
        )
    return "no"


def in_precision_of(args: TCLTrainingArguments) -> AbstractContextManager:
    """Autocast to the precision that the arguments ask for; nothing if they name none. See `mixed_precision_of`."""
    dtype = PRECISIONS.get(mixed_precision_of(args) or "")
    return nullcontext() if dtype is None else torch.autocast(processes().device.type, dtype)
