"""Devices and processes of a run, by accelerate; what it would take from the environment is given by the settings."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, GradientAccumulationPlugin

from hf_ssl_or.errors import InputError
from hf_ssl_or.launcher import cpu_is_forced, refuse_launcher_settings
from hf_ssl_or.training.arguments import SSLTrainingArguments
from hf_ssl_or.training.memory import keep_freed_memory


def build_accelerator(args: SSLTrainingArguments, run_dir: str | Path) -> Accelerator:
    """Builds the Accelerator: DDP without buffer broadcasts (global statistics are equal on every process anyway).

    What it would take from the environment is given here, since the recipe alone decides.

    Raises:
        InputError: The environment or the hardware does not go with the recipe.
    """
    cpu = args.device == "cpu" or not torch.cuda.is_available() or cpu_is_forced()
    refuse_launcher_settings(
        device="cpu" if cpu else "cuda",
        mixed_precision=args.mixed_precision,
        accumulation_steps=args.forward_chunks,
    )
    if args.mixed_precision == "fp16" and cpu:
        raise InputError("training.mixed_precision: fp16 needs a GPU; use bf16 or no")
    if cpu:
        keep_freed_memory()
    return Accelerator(
        cpu=cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend=DynamoBackend.NO,
        log_with=list(args.trackers) or None,
        project_dir=str(run_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
