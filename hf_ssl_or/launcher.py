"""Settings that a launcher puts into the environment, where neither the recipe nor the results of a run have them."""

from __future__ import annotations

import os

from hf_ssl_or.errors import InputError

_OFF = {"", "0", "false", "f", "no", "n", "none", "off"}


def cpu_is_forced() -> bool:
    """Says whether the launcher keeps this process from a GPU, as `accelerate launch --cpu` does."""
    return os.environ.get("ACCELERATE_USE_CPU", "").strip().lower() not in _OFF


def refuse_launcher_settings(
    *, device: str, mixed_precision: str | None = "no", accumulation_steps: int | None = 1
) -> None:
    """Refuses what accelerate would take from the environment beside the recipe; the defaults of a launcher pass.

    Args:
        device: Type of the device that the recipe takes, say "cuda".
        mixed_precision: The recipe's; None where the environment's is not read.
        accumulation_steps: The recipe's; None likewise.

    Raises:
        InputError: A variable asks for something that the recipe does not.
    """
    recipe: dict[str, tuple[str, set[str]]] = {
        "ACCELERATE_DOWNCAST_BF16": ("training.mixed_precision", set()),
        "ACCELERATE_DYNAMO_BACKEND": ("training.compile", set()),
        "ACCELERATE_TORCH_DEVICE": ("training.device", {device}),
        "ACCELERATE_USE_FSDP": ("training.fsdp", set()),
        "ACCELERATE_USE_DEEPSPEED": ("training.fsdp", set()),
        "ACCELERATE_USE_MEGATRON_LM": ("training.fsdp", set()),
        "ACCELERATE_USE_PARALLELISM_CONFIG": ("training.fsdp", set()),
    }
    if accumulation_steps is not None:
        steps = {"1", str(accumulation_steps)}
        recipe["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = ("training.forward_chunks", steps)
    if mixed_precision is not None:
        recipe["ACCELERATE_MIXED_PRECISION"] = ("training.mixed_precision", {mixed_precision})
    for name, (key, values) in recipe.items():
        value = os.environ.get(name, "").strip()
        if value.lower().partition(":")[0] not in _OFF | values:  # "cuda:1" is a "cuda"
            raise InputError(f"{name}={value}: the recipe decides, not the environment; unset it and set {key}")
