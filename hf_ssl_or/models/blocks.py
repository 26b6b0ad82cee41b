"""The blocks of any net: the modules that are recomputed, gathered and compiled one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import compiler, nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FEWEST_LAYERS = 3  # a convolution with its norm is no block


def block_names(net: nn.Module, run: Callable[[], object]) -> list[str]:
    """Finds the blocks of a net: the smallest entries of its lists that hold several layers and are called as one.

    A list is a container of torch, or several children of one class.

    Args:
        net: Any net.
        run: A forward of the net. What it does not call exactly once is no block: another module uses its parts.
    """
    entries: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        children = dict(module.named_children())
        kinds = Counter(type(child) for child in children.values())
        for key, child in children.items():
            listed = isinstance(module, _CONTAINERS) or kinds[type(child)] > 1
            if listed and type(child) not in _CONTAINERS and _layers(child) >= _FEWEST_LAYERS:
                entries[f"{name}.{key}".lstrip(".")] = child
    smallest = {name for name in entries if not any(other.startswith(f"{name}.") for other in entries)}
    calls: Counter[str] = Counter()
    handles = [
        entries[name].register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name in sorted(smallest)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in entries if calls[name] == 1]


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in child.parameters(recurse=False)) for child in module.modules())


class Recomputed:
    """A block for `checkpoint`: the first call is plain, later ones leave BatchNorm's running statistics alone.

    In a compiled graph there is one call: what backward recomputes are the block's products, not its side effects.

    Args:
        block: The block.
        call: What calls it.
    """

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self.block, self.call = block, call
        self.ran = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Calls the block."""
        if compiler.is_compiling():
            return self.call(*inputs, **options)
        if not self.ran:
            self.ran = True
            return self.call(*inputs, **options)
        with _statistics_kept(self.block):
            return self.call(*inputs, **options)


def recompute_in_backward(block: nn.Module, checkpoint: Callable[..., Any] | None) -> None:
    """Keeps no activation of a block for backward while it trains, or with None does keep them again.

    Args:
        block: Its copies do alike.
        checkpoint: torch's `checkpoint` with its options.
    """
    if checkpoint is None:
        vars(block).pop("forward", None)
        return
    vars(block)["_checkpoint"] = checkpoint
    vars(block)["forward"] = MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: Any, *inputs: Any, **options: Any) -> Any:
    forward = MethodType(type(self).forward, self)
    if not self.training:
        return forward(*inputs, **options)
    return self._checkpoint(Recomputed(self, forward), *inputs, **options)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Lets BatchNorm update copies of its running statistics, which are then thrown away."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
