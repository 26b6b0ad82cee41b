"""What a training run needs to know, as one strict dataclass: every default stands here once."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import IntervalStrategy

from hf_ssl_or.errors import InputError
from hf_ssl_or.settings import settings
from hf_ssl_or.training.optim import OptimizerArguments


@settings
class SSLTrainingArguments:
    """Settings of the training loop. Sizes and counts are those of the whole run, never of one process.

    Callbacks written for `transformers.Trainer` also find what they read under transformers' names (`eval_strategy`,
    `metric_for_best_model`, `logging_steps` ...), as properties.

    Attributes:
        output_dir: Folder of the run; None takes "runs/<name of the recipe>", in Python "runs/<name of the method>".
        seed: Key of all randomness: weights, order, augmentation, penalties, probes.
        epochs: Passes over the training images.
        max_steps: Ends the run after so many steps instead of `epochs`; the schedules span these steps.
        batch_size: Images per step over all processes; each gives V views.
        forward_chunks: Encodes the views of all images in so many parts to save memory. Exact: the loss,
            its statistics and the gradient stay those of the whole batch, at the price of computing activations twice.
            With batch normalization a part is made of whole views (batch_norm: per_view) or of blocks (global).
        optimizer: The optimizer and its learning-rate schedule.
        max_grad_norm: Clips the gradient, penalty included, to this norm; None leaves it.
        mixed_precision: "bf16" or "fp16" autocast; losses, penalties and statistics stay in float32.
        device: "auto" takes a GPU if there is one and the launcher does not forbid it.
        channels_last: Memory format of the encoder and its images.
        compile: Compiles the encoder with `torch.compile`.
        fsdp: Each process holds a part of every weight, gradient, teacher and optimizer state (FSDP2), and gathers
            one block at a time. The result is the same.
        gradient_checkpointing: Recomputes the activations inside each block of the encoder in backward.
        batch_norm: "global": statistics over all views and processes; "per_view": over each view and all processes,
            for comparison with code that forwards view by view.
        log_every: Steps between two lines of `metrics.jsonl`.
        monitor_every: Epochs between two evaluations of ranks, spectra and kNN; 0 for never.
        monitor_images: Training images that each evaluation takes, and as many labeled ones for each side of kNN; the
            test images are for the end alone.
        save_every: Epochs between two checkpoints; the last state is always saved.
        save_steps: Steps between two checkpoints, instead of `save_every`.
        keep_last: How many checkpoints stay; None keeps all.
        keep_best: Also keeps the checkpoint with the highest RankMe (needs no labels) or kNN accuracy.
        trackers: Trackers of accelerate: tensorboard, trackio, wandb.
        push: Pushes the encoder to the Hub, with its card: at the "end", or also after "every" checkpoint, in the
            background (of checkpoints that appear while one is being pushed, only the newest follows).
        push_to: The repository, "owner/name".
    """

    output_dir: str | Path | None = None
    seed: int = 0
    epochs: int = 100
    max_steps: int | None = None
    batch_size: int = 256
    forward_chunks: int = 1
    optimizer: OptimizerArguments = field(default_factory=OptimizerArguments)
    max_grad_norm: float | int | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    channels_last: bool = True
    compile: bool = False
    fsdp: bool = False
    gradient_checkpointing: bool = False
    batch_norm: Literal["global", "per_view"] = "global"
    log_every: int = 20
    monitor_every: int = 10
    monitor_images: int = 4096
    save_every: int = 10
    save_steps: int | None = None
    keep_last: int | None = 2
    keep_best: Literal["rankme", "knn"] | None = None
    trackers: list[str] = field(default_factory=list)
    push: Literal["every", "end"] | None = None
    push_to: str | None = None

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "forward_chunks", "log_every", "monitor_images", "save_every")
        for name in (*counts, "max_steps", "save_steps", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"training.{name}: at least 1, not {value}")
        if self.monitor_every < 0:
            raise InputError(f"training.monitor_every: 0 (never) or a number of epochs, not {self.monitor_every}")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise InputError(f"training.max_grad_norm: more than 0, or null for no clipping, not {self.max_grad_norm}")
        if self.fsdp and self.mixed_precision == "fp16":
            raise InputError("training.mixed_precision: fp16 does not go with training.fsdp; use bf16")
        if (self.push is None) != (self.push_to is None):
            raise InputError("training.push, training.push_to: give both, say push: end and push_to: owner/name")
        if self.keep_best and not self.monitor_every:
            raise InputError("training.keep_best: needs training.monitor_every above 0, which measures what is best")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, without the folder, which is no property of the run."""
        plain = dataclasses.asdict(self)
        del plain["output_dir"]
        return plain

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Returns flat values that any tracker takes."""
        return {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in self.to_dict().items()
        }

    # What callbacks of transformers read, under transformers' names.

    @property
    def num_train_epochs(self) -> int:
        """See `epochs`."""
        return self.epochs

    @property
    def train_batch_size(self) -> int:
        """See `batch_size`: images of all processes."""
        return self.batch_size

    @property
    def learning_rate(self) -> float:
        """The peak, see `optimizer`."""
        return self.optimizer.lr

    @property
    def logging_steps(self) -> int:
        """See `log_every`."""
        return self.log_every

    @property
    def logging_strategy(self) -> IntervalStrategy:
        """Always by steps."""
        return IntervalStrategy.STEPS

    @property
    def eval_strategy(self) -> IntervalStrategy:
        """See `monitor_every`."""
        return IntervalStrategy.EPOCH if self.monitor_every else IntervalStrategy.NO

    @property
    def save_strategy(self) -> IntervalStrategy:
        """See `save_every` and `save_steps`."""
        return IntervalStrategy.EPOCH if self.save_steps is None else IntervalStrategy.STEPS

    @property
    def metric_for_best_model(self) -> str:
        """See `keep_best`; RankMe, which needs no labels, where that is not set."""
        return self.keep_best or "rankme"

    @property
    def greater_is_better(self) -> bool:
        """True of all measures that a checkpoint can be kept by."""
        return True

    @property
    def load_best_model_at_end(self) -> bool:
        """False: the best checkpoint is kept, and `hf-ssl-or evaluate RUN --select` takes it."""
        return False

    @property
    def report_to(self) -> list[str]:
        """See `trackers`."""
        return self.trackers

    @property
    def run_name(self) -> str:
        """Name of the folder."""
        return os.path.basename(os.fspath(self.output_dir or "run"))
