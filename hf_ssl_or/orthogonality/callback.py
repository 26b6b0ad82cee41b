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

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class OrthogonalityCallback(TrainerCallback):
    """Adds the penalty's gradient before each optimizer step and logs the penalty as `orthogonality`.

    Where: at `on_pre_optimizer_step`, once for all accumulation steps, on gradients that are averaged over processes.
    Trainer has clipped by then, so clipping and the logged `grad_norm` see the gradient of the loss alone; the penalty
    comes on top, unclipped. The gradients are unscaled by then too, so fp16 works; a step that overflowed is skipped
    as a whole.

    The log: the value at the last step goes into `state.log_history` and to callbacks after this one, which include
    the progress bar or printer. Trackers chosen by `report_to` come before it and do not see it.

    After a resume SRIP's vectors start anew, and are exact again after some tens of steps.

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
            `base_model` and no encoder was given, or the regularizer refuses the settings.
    """

    def __init__(self, config: OrthogonalityConfig, encoder: nn.Module | None = None) -> None:
        self.config = config
        self.encoder = encoder
        self.regularizer: OrthogonalityRegularizer | None = None
        self._value: Tensor = torch.zeros(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Selects the weights."""
        kind = AcceleratorState().distributed_type
        if kind in _SHARDED:
            raise InputError(f"OrthogonalityCallback: {kind.value} shards the weights; train with DDP or one process")
        encoder, model = self.encoder, kwargs["model"]
        if encoder is None:
            if hasattr(model, "get_base_model"):  # of PEFT
                model = model.get_base_model()
            if not isinstance(model, PreTrainedModel):
                raise InputError(f"OrthogonalityCallback: a {type(model).__name__} has no base_model; give encoder=")
            encoder = encoder_of(model)
        self.regularizer = OrthogonalityRegularizer(encoder, self.config)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the gradient."""
        assert self.regularizer is not None, "training begins with on_train_begin"
        self.regularizer.set_progress(state.global_step, state.max_steps)
        self._value = self.regularizer.add_gradients()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the penalty into the training log."""
        logs = kwargs["logs"]
        if "loss" in logs:
            logs["orthogonality"] = state.log_history[-1]["orthogonality"] = self._value.item()
