"""How the weights of each kind of layer are stacks of matrices.

What matters is where one matrix ends and the next begins: the groups of a convolution, the gates of a recurrent layer,
the experts of a mixture, query, key and value of a fused weight. Which axis holds the outputs decides nothing but the
mutual coherence of square matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from hf_ssl_or.errors import InputError

QKV = ("q", "k", "v")
_GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n")}  # of LSTM and GRU, in torch's order
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head")

# Fused rows that are q, k, v of the first head, then of the second, and so on: by the layer's name, the model's file.
_HEADWISE_NAME = "query_key_value"
_HEADWISE_FILES = {"modeling_gpt_bigcode", "modeling_minimax", "tiny_vit"}
_OTHER_FILES = {"modeling_codegen"}  # neither this nor that: its fused weights stay whole

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A weight unflattened to `view`, its axes taken in `order`, flattened to (parts, O, I).

    Attributes:
        view: Shape whose axes each belong to the parts, the rows or the columns.
        order: Its axes: the one of the parts, those of the rows, those of the columns.
        matrix_shape: Shape (O, I) of one matrix.
        labels: Names of the parts, where each is a matrix of its own for a reader; empty for one, and for groups.
    """

    view: tuple[int, ...]
    order: tuple[int, ...]
    matrix_shape: tuple[int, int]
    labels: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Number of matrices."""
        return self.view[self.order[0]]


def rows(shape: Shape, parts: int = 1, labels: tuple[str, ...] = ()) -> Layout:
    """Returns the layout of (parts * O, ...): matrices one below the other, all axes but the first their columns."""
    view = (parts, shape[0] // parts, *shape[1:])
    return Layout(view, tuple(range(len(view))), (view[1], math.prod(view[2:])), labels)


def stack(shape: Shape) -> Layout:
    """Returns the layout of (..., O, I): a matrix for each index of the leading axes."""
    parts, outputs, inputs = math.prod(shape[:-2]), *shape[-2:]
    labels = tuple(str(i) for i in range(parts)) if parts > 1 else ()
    return Layout((parts, outputs, inputs), (0, 1, 2), (outputs, inputs), labels)


def layer_layouts(
    path: str, layer: nn.Module, parent: nn.Module | None, split_qkv: bool
) -> Iterator[tuple[str, Callable[[Shape], Layout]]]:
    """Yields the weights of a layer that are known to be matrices: the attribute, and its layout by its shape.

    Args:
        path: The layer's name in the model.
        layer: The layer.
        parent: The module that holds it, which knows the number of heads.
        split_qkv: Whether a fused attention weight is three matrices.
    """
    fused = split_qkv and is_fused(path, layer, parent)
    if isinstance(layer, nn.Linear):
        yield "weight", (lambda shape: _fused_rows(path, parent, shape)) if fused else rows
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        yield "weight", lambda shape: rows(shape, layer.groups)
    elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        yield "weight", lambda shape: _inputs_first(shape, layer.groups)
    elif isinstance(layer, Conv1D):
        yield "weight", lambda shape: _columns(shape, QKV if fused else ())
    elif isinstance(layer, nn.MultiheadAttention):
        yield "in_proj_weight", lambda shape: rows(shape, 3, QKV)
        yield from ((name, rows) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    elif isinstance(layer, nn.RNNCellBase):
        yield from ((name, lambda shape: _gates(shape, layer.hidden_size)) for name in ("weight_ih", "weight_hh"))
    elif isinstance(layer, nn.RNNBase):
        for name in (name for names in layer._all_weights for name in names if name.startswith("weight")):
            projects = name.startswith("weight_hr")
            yield name, rows if projects else lambda shape: _gates(shape, layer.hidden_size)
    else:
        transposed = getattr(layer, "is_transposed", False)
        yield from ((name, lambda shape: _experts(shape, transposed)) for name in _expert_weights(layer))


def is_fused(path: str, layer: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a layer makes queries, keys and values in a known order, as many of each as it has inputs."""
    name = path.rpartition(".")[2]
    if not ("qkv" in name or name in (_HEADWISE_NAME, "c_attn")) or _files(parent) & _OTHER_FILES:
        return False
    if isinstance(layer, Conv1D):
        return bool(layer.nf == 3 * layer.nx)
    return isinstance(layer, nn.Linear) and layer.out_features == 3 * layer.in_features


def _files(module: nn.Module | None) -> set[str]:
    """Files of a module's classes; FSDP2 puts one of its own in front."""
    return {cls.__module__.rpartition(".")[2] for cls in type(module).__mro__}


def _fused_rows(path: str, parent: nn.Module | None, shape: Shape) -> Layout:
    if path.rpartition(".")[2] != _HEADWISE_NAME and not _files(parent) & _HEADWISE_FILES:
        return rows(shape, 3, QKV)
    owners = parent, getattr(parent, "config", None)
    heads = next((getattr(owner, name) for owner in owners for name in _HEAD_COUNTS if hasattr(owner, name)), None)
    if not isinstance(heads, int) or shape[0] % (3 * heads):
        raise InputError(f"orthogonality.split_qkv: the heads of '{path}.weight' are not known; leave it false")
    outputs = shape[0] // 3
    return Layout((heads, 3, outputs // heads, shape[1]), (1, 0, 2, 3), (outputs, shape[1]), QKV)


def _columns(shape: Shape, labels: tuple[str, ...]) -> Layout:
    """(I, parts * O): transposed matrices side by side."""
    parts = len(labels) or 1
    outputs = shape[1] // parts
    return Layout((shape[0], parts, outputs), (1, 2, 0), (outputs, shape[0]), labels)


def _inputs_first(shape: Shape, groups: int) -> Layout:
    """(groups * I, O, ...): a transposed convolution, whose groups are groups of inputs."""
    inputs, outputs, *kernel = shape
    view = (groups, inputs // groups, outputs, *kernel)
    return Layout(view, (0, 2, 1, *range(3, len(view))), (outputs, inputs // groups * math.prod(kernel)))


def _gates(shape: Shape, hidden: int) -> Layout:
    gates = shape[0] // hidden
    return rows(shape, gates, _GATES.get(gates, ()))


def _experts(shape: Shape, transposed: bool) -> Layout:
    experts, first, second = shape
    labels = tuple(f"expert {i}" for i in range(experts))
    order, matrix_shape = ((0, 2, 1), (second, first)) if transposed else ((0, 1, 2), (first, second))
    return Layout(shape, order, matrix_shape, labels)


def _expert_weights(layer: nn.Module) -> list[str]:
    """Names of (experts, ., .) parameters of a layer that says how many experts it has."""
    counts = [getattr(layer, name) for name in _EXPERT_COUNTS if isinstance(getattr(layer, name, None), int)]
    weights = {name: w for name, w in layer._parameters.items() if w is not None and "bias" not in name}
    return [name for name, w in weights.items() if not is_lazy(w) and w.ndim == 3 and w.shape[0] in counts]
