"""Which matrices of a module are regularized, and why the others are not.

Taken are the weights of linear layers, convolutions and transposed ones, multi-head attention, recurrent layers and
fused experts (`layouts`). A grouped convolution is as many matrices as it has groups, because groups share neither
inputs nor outputs; a recurrent weight one per gate, a fused expert weight one per expert, and the fused projection of
`nn.MultiheadAttention` three. With `split_qkv` so is every other fused attention weight. Left out are heads,
embeddings, norms, adapters and bare parameters, unless a pattern of `include` matches nothing else, and what cannot be
taken: weights without inputs or outputs, without data, quantized ones.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.layouts import QKV, Layout, Shape, layer_layouts, rows, stack

# Heads of transformers' models that are their own base model, such as CLIP's classifiers.
_HEADS = ("classifier", "classification_head", "score", "qa_outputs", "lm_head")

_ADAPTER = "adapter: a factor of an update"

# What nobody expects to be regularized; other reasons are worth a warning.
ROUTINE = frozenset(
    {"embedding", "position embedding", "token", "norm", "vector", "head", "tied", "frozen", "excluded"}
)


@dataclass(frozen=True)
class Site:
    """A parameter that is a stack of matrices of one shape.

    It is found by its name at each use, so that the model may be moved, cast, loaded or changed in between.
    """

    name: str
    root: nn.Module = field(repr=False)
    shape: tuple[int, ...]
    layout: Layout

    @property
    def parts(self) -> int:
        """Number of matrices."""
        return self.layout.parts

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape (O, I) of one matrix."""
        return self.layout.matrix_shape

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now.

        Raises:
            InputError: It is gone, is no longer a parameter of this shape, or has no numbers to work with.
        """
        try:
            weight = attrgetter(self.name)(self.root)
        except AttributeError:
            raise InputError(f"orthogonality: {self.name!r} is gone; make the regularizer again") from None
        if not isinstance(weight, nn.Parameter):
            raise InputError(
                f"orthogonality: {self.name!r} is no longer a parameter (parametrized, or flattened by FSDP1); "
                "make the regularizer again with the name in exclude"
            )
        if reason := _unusable(weight):
            raise InputError(f"orthogonality: {self.name!r} is now left out ({reason}); make the regularizer again")
        if tuple(weight.shape) != self.shape:
            change = f"has shape {tuple(weight.shape)} now, and had {self.shape}"
            raise InputError(f"orthogonality: {self.name!r} {change}; make the regularizer again")
        return weight

    @property
    def matrix_names(self) -> list[str]:
        """The name, or one for each matrix where the layout has labels."""
        return [f"{self.name}[{label}]" for label in self.layout.labels] or [self.name]

    def matrices(self, weight: Tensor | None = None) -> Tensor:
        """Returns the stack (parts, O, I); a view of contiguous weights, and of channels-last ones that are wide.

        Args:
            weight: The weight, gathered where it is sharded over processes; None to look it up.
        """
        weight = self.weight if weight is None else weight
        ordered = weight.reshape(self.layout.view).permute(self._order(weight))
        return ordered.reshape(self.parts, *self.matrix_shape)

    def like_weight(self, update_POI: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns an update of `matrices()` with the shape, memory order and type of the weight."""
        weight = self.weight if weight is None else weight
        order = self._order(weight)
        places = [order.index(axis) for axis in range(len(order))]
        update = update_POI.reshape([self.layout.view[axis] for axis in order]).permute(places)
        return update.reshape(self.shape).to(weight.dtype)

    def _order(self, weight: Tensor) -> tuple[int, ...]:
        """The order of the axes, columns as they lie in memory: penalties do not see it; vectors of tall ones do."""
        order, (outputs, inputs) = self.layout.order, self.matrix_shape
        if weight.is_contiguous() or outputs > inputs or order != tuple(range(len(order))):
            return order
        return (0, 1, *order[3:], 2)


@dataclass(frozen=True)
class Selection:
    """The matrices that are regularized, and the reason for every other parameter that looks like some."""

    sites: list[Site]
    skipped: dict[str, str]


def kind(reason: str) -> str:
    """Returns a reason without its particulars."""
    return reason.partition(":")[0]


def count_kinds(reasons: Iterable[str]) -> str:
    """Returns the reasons with their counts, the most frequent first."""
    counts = Counter(kind(reason) for reason in reasons)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "nothing"


def select_sites(module: nn.Module, config: OrthogonalityConfig) -> list[Site]:
    """Returns the sites of `select`."""
    return select(module, config).sites


def select(module: nn.Module, config: OrthogonalityConfig) -> Selection:
    """Selects the weights that `include`, `exclude` and `split_qkv` ask for, each shared weight once.

    Raises:
        InputError: A pattern matches no weight, `split_qkv` finds no fused weight, a weight is parametrized or
            flattened by FSDP1, or nothing is selected.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    _refuse_flattened(modules)
    layers, parametrized = _known_layers(modules, config.split_qkv)
    weights = {
        name: weight
        for name, weight in module.named_parameters(remove_duplicate=False)
        if name in layers or is_lazy(weight) or weight.ndim > 1
    }
    outside = _adapters_and_heads(modules)
    layouts, reasons, unusable = _classify(weights, layers, modules, outside)
    made_of = {name for name, path in parametrized.items() if not _is_outside(modules[path], outside)}
    names = [*weights, *made_of]
    default = (layouts.keys() - reasons.keys()) | made_of
    included = _include(config.include, names, default) if config.include else default
    excluded = _matches("exclude", config.exclude, names)
    if refused := sorted(made_of & included - excluded.keys()):
        raise InputError(f"orthogonality: {refused[0]!r} is parametrized, not a parameter; add it to exclude")
    sites, skipped = [], {}
    for name in weights:
        if name in unusable:
            skipped[name] = unusable[name]
        elif name in excluded:
            skipped[name] = f"excluded: by {excluded[name]!r}"
        elif name in included:
            sites.append(Site(name, module, tuple(weights[name].shape), layouts[name]))
        else:
            skipped[name] = reasons.get(name, "excluded: no pattern of include matches")
    if not sites:
        why = f"see include and exclude (left out: {count_kinds(skipped.values())})"
        raise InputError(f"orthogonality: no convolution or linear weight is selected; {why}")
    if config.split_qkv and not any(site.layout.labels == QKV for site in sites):
        raise InputError("orthogonality.split_qkv: no selected weight is a fused qkv weight; leave it false")
    return Selection(sites, skipped)


def _refuse_flattened(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if isinstance(module, FullyShardedDataParallel):
            where = repr(path) if path else "the model"
            raise InputError(f"orthogonality: FSDP1 flattens the weights of {where}; use FSDP2 (fully_shard)")


def _known_layers(
    modules: dict[str, nn.Module], split_qkv: bool
) -> tuple[dict[str, Callable[[Shape], Layout]], dict[str, str]]:
    """The layouts of layers' weights by parameter name; and the paths of layers whose weight is made of others."""
    layers, parametrized = {}, {}
    for path, layer in modules.items():
        parent = modules[path.rpartition(".")[0]] if path else None
        for attribute, build in layer_layouts(path, layer, parent, split_qkv):
            name = f"{path}.{attribute}" if path else attribute
            weight = getattr(layer, attribute, None)
            if isinstance(weight, nn.Parameter):
                layers[name] = build
            elif weight is not None:
                parametrized[name] = path
    return layers, parametrized


def _classify(
    weights: dict[str, nn.Parameter],
    layers: dict[str, Callable[[Shape], Layout]],
    modules: dict[str, nn.Module],
    outside: dict[int, str],
) -> tuple[dict[str, Layout], dict[str, str], dict[str, str]]:
    """Layouts of what can be taken, why some of it is left out unless `include` asks for it, and why others cannot."""
    layouts: dict[str, Layout] = {}
    reasons: dict[str, str] = {}
    unusable: dict[str, str] = {}
    uses: dict[int, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        uses[id(weight)].append(name)
    for names in uses.values():
        first, *others = names
        weight = weights[first]
        unusable |= {name: f"tied: counted as {first!r}" for name in others}
        if reason := _unusable(weight):
            unusable[first] = reason
            continue
        build = next((layers[name] for name in names if name in layers), None)
        layouts[first] = (build or (rows if weight.ndim == 2 else stack))(tuple(weight.shape))
        found = [_reason(name, weight, modules, build is not None, outside) for name in names]
        if reason := next(filter(None, found), None):
            reasons[first] = reason
    return layouts, reasons, unusable


def _unusable(weight: nn.Parameter) -> str | None:
    """Why a parameter has no numbers to work with."""
    if is_lazy(weight):
        return "uninitialized: a lazy layer before its first call"
    if weight.is_meta:
        return "meta: has no data"
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if wrapped or not (weight.is_floating_point() or weight.is_complex()) or weight.dtype.itemsize < 2:
        return f"quantized: {type(weight.data).__name__ if wrapped else weight.dtype}"
    if not weight.numel():
        return f"empty: shape {tuple(weight.shape)}"
    return None if weight.ndim > 1 else f"flat: shape {tuple(weight.shape)}"


def _adapters_and_heads(modules: dict[str, nn.Module]) -> dict[int, str]:
    """Why parameters, by id, are not the encoder's."""
    adapters: list[Any] = []
    heads: list[nn.Module] = []
    for path, module in modules.items():
        if path.rpartition(".")[2].startswith("lora_"):
            adapters.append(module)
        adapters += [getattr(module, name, None) for name in getattr(module, "adapter_layer_names", ())]
        heads += _heads(module)
    reasons = {id(weight): "head" for head in heads for weight in head.parameters()}
    for module in modules.values():
        base = encoder_of(module) if isinstance(module, PreTrainedModel) else module
        if base is not module:
            inside = {id(weight) for weight in base.parameters()}
            reasons |= {id(weight): "head" for weight in module.parameters() if id(weight) not in inside}
    for adapter in adapters:
        if isinstance(adapter, nn.Module):
            reasons |= {id(weight): _ADAPTER for weight in adapter.parameters()}
    return reasons


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the model without its head: `base_model`, or the model where that lacks the embeddings (DINOv3)."""
    return model if hasattr(model, "embeddings") else model.base_model


def _heads(module: nn.Module) -> list[nn.Module]:
    """The heads that transformers and timm name as such."""
    found: list[Any] = []
    if isinstance(module, PreTrainedModel):
        found = [getattr(module, name, None) for name in _HEADS]
    elif hasattr(module, "get_classifier") and hasattr(module, "reset_classifier"):
        get_classifier: Any = module.get_classifier
        classifier = get_classifier()
        found = list(classifier) if isinstance(classifier, tuple | list) else [classifier]
    return [head for head in found if isinstance(head, nn.Module)]


def _is_outside(layer: nn.Module, outside: dict[int, str]) -> bool:
    return any(id(weight) in outside for weight in layer.parameters())


def _reason(
    name: str, weight: nn.Parameter, modules: dict[str, nn.Module], known: bool, outside: dict[int, str]
) -> str | None:
    """Why a usable parameter is left out unless `include` asks for it."""
    path, _, attribute = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "position embedding" if re.search("pos|wpe$", path.rpartition(".")[2]) else "embedding"
    if known or id(weight) in outside:
        return outside.get(id(weight))
    if attribute.startswith("lora_"):
        return _ADAPTER
    made = isinstance(owner, nn.Linear | _ConvNd) and not isinstance(owner.weight, nn.Parameter)
    if made or ".parametrizations." in f".{path}.":
        return "parametrized: a part of another weight"
    if "Norm" in type(owner).__name__:
        return "norm"
    if re.search("(^|_)pos(ition|_|$)|relative_position", attribute):
        return "position embedding"
    if "token" in attribute:
        return "token"
    if weight.numel() == max(weight.shape):
        return "vector"
    return f"bare: a parameter of {type(owner).__name__}, taken if include names it"


def _include(patterns: list[str], names: list[str], default: set[str]) -> set[str]:
    """What patterns ask for: weights taken by default, and others where a pattern matches no such weight."""
    found: set[str] = set()
    for pattern in patterns:
        matched = _matches("include", [pattern], names).keys()
        found |= (matched & default) or matched
    return found


def _matches(field: str, patterns: Iterable[str], names: list[str]) -> dict[str, str]:
    """The names that patterns match, with the pattern."""
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise unknown(f"orthogonality.{field} pattern", pattern, names)
        found |= dict.fromkeys(matched, pattern)
    return found
