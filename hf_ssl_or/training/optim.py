"""Optimizers: parameter groups, a batched LARS, and functions of the step for learning rate and weight decay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import local_part, tensor_norms
from hf_ssl_or.errors import InputError
from hf_ssl_or.settings import settings

_TOKEN_OR_POSITION = re.compile(r"_tokens?$|pos_embed|position")


@settings
class OptimizerArguments:
    """Which optimizer, and its learning rate over the run.

    Attributes:
        name: AdamW, SGD with momentum, or LARS for large batches.
        lr: Peak learning rate for the whole batch over all processes, taken as it is given.
        scale_lr: Takes `lr` for 256 images instead: the peak becomes lr * batch_size / 256.
        weight_decay: Decoupled in AdamW, added to the gradient in SGD and LARS.
        weight_decay_end: Where half a cosine over the run takes the weight decay; None leaves it as it is.
        momentum: Of SGD and LARS; AdamW has `betas`.
        nesterov: Nesterov momentum for SGD and LARS.
        betas: Decay of AdamW's averages of the gradient and of its square.
        eps: Added to the denominator in AdamW and in the trust ratio of LARS.
        lars_eta: Trust coefficient of LARS: length of a step relative to the length of the weight.
        lars_clip: Never lets LARS step further than SGD with the same learning rate would.
        exclude_bias_and_norm: No weight decay and no trust ratio for vectors (biases, norm layers) and for position
            and class tokens.
        schedule: After the warm-up: half a cosine down to the minimum, or constant.
        warmup_epochs: Epochs of linear warm-up; fractions are allowed.
        min_lr_ratio: Where the cosine ends, as a share of the peak.
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float | int = 1e-3
    scale_lr: bool = False
    weight_decay: float | int = 1e-4
    weight_decay_end: float | int | None = None
    momentum: float | int = 0.9
    nesterov: bool = False
    betas: tuple[float | int, float | int] | list[float | int] = (0.9, 0.999)
    eps: float | int = 1e-8
    lars_eta: float | int = 0.02
    lars_clip: bool = True
    exclude_bias_and_norm: bool = True
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float | int = 0
    min_lr_ratio: float | int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "lars_eta"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"training.optimizer.{name}: more than 0, not {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"training.optimizer.{name}: at least 0, not {getattr(self, name)}")
        if self.weight_decay_end is not None and not 0 <= self.weight_decay_end < math.inf:
            raise InputError(
                f"training.optimizer.weight_decay_end: at least 0, or null for no change, not {self.weight_decay_end}"
            )
        if not 0 <= self.momentum < 1:
            raise InputError(f"training.optimizer.momentum: lies in [0, 1), not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise InputError("training.optimizer.nesterov: needs training.optimizer.momentum above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"training.optimizer.betas: two numbers in [0, 1), not {list(self.betas)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise InputError(f"training.optimizer.min_lr_ratio: lies in [0, 1], not {self.min_lr_ratio}")


def parameter_groups(module: nn.Module, weight_decay: float, exclude_bias_and_norm: bool) -> list[dict[str, Any]]:
    """Sorts the trainable parameters into one group with and one without weight decay and trust ratio.

    Args:
        module: Parameters that need no gradient (a teacher's) are left out.
        weight_decay: Of the first group.
        exclude_bias_and_norm: Puts vectors, position and class tokens into the second group; False puts all into one.

    Returns:
        Groups for a torch optimizer: `params` as (name, parameter) pairs, `weight_decay`, and `adapt`, which says
        whether it has decay and, in LARS, trust ratios. A group without parameters is left out.
    """
    adapted: list[tuple[str, nn.Parameter]] = []
    exempt: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim <= 1 or _TOKEN_OR_POSITION.search(name.rpartition(".")[2])
            (exempt if exclude_bias_and_norm and excluded else adapted).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": adapted, "weight_decay": weight_decay, "adapt": True},
        {"params": exempt, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, arguments: OptimizerArguments, *, batch_size: int) -> torch.optim.Optimizer:
    """Builds the optimizer of a module's trainable parameters.

    Args:
        module: The method with its encoder; it may move to another device afterwards.
        arguments: Settings.
        batch_size: Images per step over all processes; matters with `scale_lr` alone.

    Returns:
        The optimizer at its peak learning rate. Each group keeps that peak as `base_lr`.
    """
    lr = arguments.lr * batch_size / 256 if arguments.scale_lr else arguments.lr
    groups = parameter_groups(module, arguments.weight_decay, arguments.exclude_bias_and_norm)
    if not groups:
        raise InputError("nothing to train: no parameter of the method needs a gradient")
    for group in groups:
        group["base_lr"] = lr
    if arguments.name == "adamw":
        beta1, beta2 = arguments.betas
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=arguments.eps, fused=True)
    momentum, nesterov = arguments.momentum, arguments.nesterov
    if arguments.name == "sgd":
        # not fused: torch's fused SGD fails when a frozen parameter gets its first gradient later than the others
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, foreach=True)
    return LARS(
        groups,
        lr,
        momentum=momentum,
        nesterov=nesterov,
        eta=arguments.lars_eta,
        clip=arguments.lars_clip,
        eps=arguments.eps,
    )


class LARS(torch.optim.Optimizer):
    """SGD whose step is scaled, weight by weight, to the weight's own length, without waiting for the device.

    With weight w, gradient g, decay d: q = eta |w| / (|g| + d |w| + eps), m = momentum m + q (g + d w), w -= lr m
    (You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, algorithm 1). `clip` takes
    min(q / lr, 1) for q, so that no weight moves further than it would in SGD. A weight or gradient of length 0 has
    q = 1. All weights of a group are updated together; a group with `adapt=False` has q = 1 throughout. Parameters
    without gradient are skipped.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: Learning rate.
        momentum: Decay of the sum of past updates.
        weight_decay: Added to the gradient, inside the trust ratio.
        nesterov: Steps along g + momentum m instead of m.
        eta: Trust coefficient.
        clip: Makes lr * q the smaller of `lr` and the unclipped q.
        eps: Keeps the ratio finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, "eta": eta, "clip": clip, "eps": eps, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; `closure`, if given, computes the loss anew and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        params = [local_part(weight) for weight in weights]
        grads = [local_part(weight.grad) for weight in weights if weight.grad is not None]
        updates: Any = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(weights, group))
        if momentum := group["momentum"]:
            buffers: Any = [local_part(self._buffer(weight)) for weight in weights]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            if group["nesterov"]:
                torch._foreach_add_(updates, buffers, alpha=momentum)
            else:
                updates = buffers
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _trust_ratios(weights: list[Tensor], group: dict[str, Any]) -> Any:
    """Computes q of every weight, as scalars on the device."""
    param_norm_P = tensor_norms(weights)
    grad_norm_P = tensor_norms([weight.grad for weight in weights if weight.grad is not None])
    ratio_P = group["eta"] * param_norm_P / (grad_norm_P + group["weight_decay"] * param_norm_P + group["eps"])
    if group["clip"]:
        ratio_P = (ratio_P / max(group["lr"], torch.finfo(torch.float32).tiny)).clamp(max=1)
    return torch.where((param_norm_P > 0) & (grad_norm_P > 0), ratio_P, 1.0).unbind()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients by one factor, so that together they are no longer than `max_norm`.

    Args:
        parameters: Those without gradient are skipped. Sharded ones cost one small message.
        max_norm: The longest gradient.

    Returns:
        Length of the gradient before, a scalar on the device.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(tensor_norms(grads))
    torch._foreach_mul_([local_part(grad) for grad in grads], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def learning_rate(step: int, total_steps: int, warmup_steps: int, arguments: OptimizerArguments) -> float:
    """Returns the learning rate of a step as a share of its peak: a function of the step alone, so resume is exact.

    Args:
        step: Step of the run, from 0.
        total_steps: Steps of the whole run; the cosine reaches its minimum there.
        warmup_steps: Steps of the linear warm-up; the peak is at this step.
        arguments: Returns the schedule and its minimum.

    Returns:
        A factor in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if arguments.schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return arguments.min_lr_ratio + (1 - arguments.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to `factor` times its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def weight_decay(step: int, total_steps: int, arguments: OptimizerArguments) -> float:
    """Returns the weight decay of a step: constant, or half a cosine that reaches `weight_decay_end` after the run.

    Args:
        step: Step of the run, from 0.
        total_steps: Steps of the whole run.
        arguments: Where it begins and ends.
    """
    start, end = arguments.weight_decay, arguments.weight_decay_end
    if end is None:
        return start
    return start + (end - start) * (1 - math.cos(math.pi * min(step / total_steps, 1.0))) / 2


def set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the decay of the groups that have one, see `parameter_groups`."""
    for group in optimizer.param_groups:
        if group["adapt"]:
            group["weight_decay"] = value
