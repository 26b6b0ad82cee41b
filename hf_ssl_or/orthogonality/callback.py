"""Orthogonality regularization in `transformers.Trainer`, for any model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.orthogonality.selection import encoder_of
from hf_ssl_or.orthogonality.strength import rate_of

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class OrthogonalityCallback(TrainerCallback):
    """Adds the penalty's gradient before each optimizer step, or with a strength moves the weights after it.

    The penalty is logged as `orthogonality`; with a strength it has no weight.

    The gradient is added at `on_pre_optimizer_step`, once for all accumulation steps, to gradients that are averaged
    over processes. Trainer has clipped by then, so clipping and the logged `grad_norm` see the gradient of the loss
    alone; the penalty comes on top, unclipped. The gradients are unscaled by then too, so fp16 works; a step that
    overflowed is skipped as a whole.

    The step of a strength is taken at `on_optimizer_step`, also where the optimizer's was skipped. It is spread over
    the run as the learning rate is where the scheduler is a `LambdaLR`, as nearly all of transformers' are, and evenly
    with another one (`orthogonality.strength.rate_of`).

    The log: the value at the last step goes into `state.log_history` and to callbacks after this one, which include
    the progress bar or printer. Trackers chosen by `report_to` come before it and do not see it.

    After a resume SRIP's vectors start anew, and are exact again after some tens of steps. Target "start" keeps the
    Gram matrices that the model has when Trainer is made, before it loads a checkpoint.

    Example:
        ```python
        config = OrthogonalityConfig(penalty="so", weight=1e-6)
        Trainer(model, args, train_dataset=data, callbacks=[OrthogonalityCallback(config)]).train()
        ```

    Args:
        config: The settings.
        encoder: The module to regularize, a part of the model that Trainer trains; None for `model.base_model`, which
            leaves out the head. Of a PEFT model this is the base model with its adapters; those are left out unless
            `include` names them.

    Raises:
        InputError: At the start of training: the weights are sharded (FSDP, DeepSpeed, Megatron), the model has no
            `base_model` and no encoder was given, the regularizer refuses the settings, or Trainer got a callback with
            target "start" after it was made.
    """

    def __init__(self, config: OrthogonalityConfig, encoder: nn.Module | None = None) -> None:
        self.config = config
        self.encoder = encoder
        self.regularizer: OrthogonalityRegularizer | None = None
        self._start: dict[str, Tensor] = {}
        self._value: Tensor = torch.zeros(())

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the Gram matrices of the weights that were handed over."""
        if self.config.target == "start" and self.config.penalty != "none":
            self._start = self._build(kwargs["model"]).state_dict()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Selects the weights."""
        self.regularizer = self._build(kwargs["model"])
        if self._start:
            self.regularizer.load_state_dict(self._start)
        elif self.regularizer.state_dict() and self.config.target == "start":
            raise InputError(
                "OrthogonalityCallback: target start is for Trainer(..., callbacks=[...]), not add_callback"
            )
        if self.regularizer.decoupled:
            self.regularizer.follow(rate_of(kwargs["lr_scheduler"]))

    def _build(self, model: Any) -> OrthogonalityRegularizer:
        kind = AcceleratorState().distributed_type
        if kind in _SHARDED:
            raise InputError(f"OrthogonalityCallback: {kind.value} shards the weights; train with DDP or one process")
        encoder = self.encoder
        if encoder is None:
            if hasattr(model, "get_base_model"):  # of PEFT
                model = model.get_base_model()
            if not isinstance(model, PreTrainedModel):
                raise InputError(f"OrthogonalityCallback: a {type(model).__name__} has no base_model; give encoder=")
            encoder = encoder_of(model)
        return OrthogonalityRegularizer(encoder, self.config)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the gradient."""
        assert self.regularizer is not None, "training begins with on_train_begin"
        self.regularizer.set_progress(state.global_step, state.max_steps)
        self._value = self.regularizer.add_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the step of a strength."""
        assert self.regularizer is not None, "training begins with on_train_begin"
        if self.regularizer.decoupled:
            self._value = self.regularizer.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the penalty into the training log."""
        logs = kwargs["logs"]
        if "loss" in logs:
            logs["orthogonality"] = state.log_history[-1]["orthogonality"] = self._value.item()
