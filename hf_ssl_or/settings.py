"""The one way to declare settings: a keyword-only dataclass whose names and types are checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from huggingface_hub.dataclasses import strict

from hf_ssl_or.errors import InputError, unknown

C = TypeVar("C")

# What people type by habit, from transformers, timm, Lightning or lightly, and where it is set here.
HABITS = {
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_epochs": "training.epochs",
    "epochs": "training.epochs",
    "output": "training.output_dir",
    "seed": "training.seed",
    "per_device_train_batch_size": "training.batch_size (images of all processes together)",
    "train_batch_size": "training.batch_size (images of all processes together)",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.forward_chunks (parts of one batch; the batch size does not change)",
    "learning_rate": "training.optimizer.lr",
    "lr": "training.optimizer.lr",
    "weight_decay": "training.optimizer.weight_decay",
    "adam_epsilon": "training.optimizer.eps",
    "optim": "training.optimizer.name",
    "optimizer": "training.optimizer.name",
    "lr_scheduler_type": "training.optimizer.schedule",
    "warmup_epochs": "training.optimizer.warmup_epochs",
    "warmup_steps": "training.optimizer.warmup_epochs (in epochs; fractions are allowed)",
    "warmup_ratio": "training.optimizer.warmup_epochs (in epochs; fractions are allowed)",
    "fp16": "training.mixed_precision: fp16",
    "bf16": "training.mixed_precision: bf16",
    "precision": "training.mixed_precision",
    "torch_compile": "training.compile",
    "use_cpu": "training.device: cpu",
    "no_cuda": "training.device: cpu",
    "sharding": "training.fsdp",
    "logging_steps": "training.log_every",
    "eval_steps": "training.monitor_every (in epochs)",
    "eval_strategy": "training.monitor_every (in epochs)",
    "save_strategy": "training.save_every (in epochs), or training.save_steps",
    "save_total_limit": "training.keep_last",
    "metric_for_best_model": "training.keep_best",
    "load_best_model_at_end": "training.keep_best",
    "report_to": "training.trackers",
    "push_to_hub": "training.push and training.push_to",
    "hub_model_id": "training.push_to",
    "dataloader_num_workers": "data.num_workers",
    "num_workers": "data.num_workers",
    "img_size": "data.image_size",
    "num_views": "views.count",
    "model": "encoder.name",
    "arch": "encoder.name",
    "backbone": "encoder.name",
    "in_chans": "encoder.num_channels",
}


def unknown_setting(kind: str, name: str, known: list[str]) -> InputError:
    """Makes the error for an unknown setting: what it is called here, where another library has a name for it."""
    ours = HABITS.get(name.replace("-", "_"))
    return unknown(kind, name, known) if ours is None else InputError(f"unknown {kind} {name!r}: set {ours}")


@dataclass_transform(kw_only_default=True)
def settings(cls: type[C]) -> type[C]:
    """Decorates a class of annotated fields: a wrong type or an unknown name is an error when an object is made.

    The class also gets `to_dict()` and `to_json_string()`, with plain values, as callbacks and trackers expect.

    The Hub library's `strict` alone passes over annotations that are strings, as `from __future__ import annotations`
    makes them all; here they are resolved first.
    """
    cls = dataclass(kw_only=True)(cls)
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        field.type = hints[field.name]
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    cls = strict(cls)
    make = cls.__init__

    @wraps(make)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in names:
                raise unknown_setting(f"setting of {cls.__name__}", name, names)
        make(self, *args, **values)

    def to_dict(self: Any) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    def to_json_string(self: Any) -> str:
        """Returns the settings as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    cls.__init__ = __init__  # type: ignore[method-assign]
    for function in (to_dict, to_json_string):
        if function.__name__ not in vars(cls):
            setattr(cls, function.__name__, function)
    return cls
