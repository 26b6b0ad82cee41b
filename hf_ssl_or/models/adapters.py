"""Any encoder in the form that training and evaluation expect: images in, `pooler_output` (B, hidden_size) out."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .blocks import block_names, recompute_in_backward
from .configuration_ssl import OrthogonalityConfig
from .modeling_ssl import SSLPreTrainedModel

POOLER, CLASS_TOKEN, MEAN = "pooler output", "class token", "mean"
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_KEYS = ("pooler_output", "features", "embeddings", "x_norm_clstoken", "image_embeds", "last_hidden_state")
_SIZES = (32, 224, 64, 96, 128, 28, 160, 192, 256, 299, 384)  # tried in turn where nothing says a size
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, NotImplementedError)


@dataclass
class AdapterConfig:
    """What is known of an encoder, and what a run adds to it.

    Attributes:
        architecture: What its library calls it.
        hidden_size: Number of features.
        num_channels: Channels of an image.
        image_size: Side of its images in pixels; None where it takes any, as far as is known.
        stage_names: Names of its hidden states; None where it gives none.
        pretraining: Where its weights come from, in plain values.
        preprocessing: What becomes of pixels, in plain values.
        orthogonality: How its weights are kept near orthogonal.
    """

    architecture: str
    hidden_size: int
    num_channels: int
    image_size: int | None = None
    stage_names: list[str] | None = None
    pretraining: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    orthogonality: OrthogonalityConfig | dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Returns what a run adds, in plain values."""
        orthogonality = self.orthogonality
        if isinstance(orthogonality, OrthogonalityConfig):
            orthogonality = orthogonality.to_dict()
        return {
            "pretraining": self.pretraining,
            "preprocessing": self.preprocessing,
            "orthogonality": orthogonality,
        }


class EncoderAdapter(nn.Module):
    """A module of another library with the output of this package's encoders; see `adapt_encoder`.

    Attributes:
        net: The module itself, without a classifier.
        config: Sizes, and what a run adds.
        pooling: Where the features come from: "pooler output", "class token" or "mean".
        preprocessing: What the source's image processor does to images, in plain values; None where there is none.
        left_out: What this encoder cannot do or does not use, a sentence each.
        description: "library" ("transformers", "timm" or "torch"), "name" and "class".
    """

    def __init__(self, net: nn.Module, library: str, name: str) -> None:
        super().__init__()
        self.net = net
        self.description = {"library": library, "name": name, "class": _class_name(net)}
        self.pooling, self.left_out = POOLER, list[str]()
        self.preprocessing: dict[str, Any] | None = None
        self._key: str | None = None
        self._blocks: list[str] = []
        self._parameters_of_forward = set(inspect.signature(net.forward).parameters)
        self.config = AdapterConfig(architecture=name, hidden_size=0, num_channels=3)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.net.parameters()).dtype

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> BaseModelOutputWithPooling:
        """Encodes normalized images (B, C, H, W).

        Args:
            pixel_values: The images.
            output_hidden_states: Also gives hidden states, one for each of `config.stage_names`.

        Returns:
            `pooler_output` (B, hidden_size), and `hidden_states` where they were asked for.

        Raises:
            ValueError: The module has no hidden states, or gives another number of features for images of this size.
        """
        if output_hidden_states and self.config.stage_names is None:
            raise ValueError(f"output_hidden_states: {self.description['name']} gives none")
        output, hidden_states = self._run(pixel_values.to(self.dtype), output_hidden_states)
        features_BF = _read(output, self._key, self.pooling)
        if features_BF.shape[1] != self.config.hidden_size:
            sizes = f"{features_BF.shape[1]} features of {'x'.join(map(str, pixel_values.shape[1:]))} images"
            raise ValueError(f"encoder: {self.description['name']} gives {sizes}, not {self.config.hidden_size}")
        return BaseModelOutputWithPooling(
            pooler_output=features_BF,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def _run(self, x_BCHW: Tensor, hidden: bool) -> tuple[Any, Any]:
        """Returns the module's own output and its hidden states."""
        net: Any = self.net
        if self.description["library"] == "timm":
            if not hidden:
                return net(x_BCHW), None
            last, states = net.forward_intermediates(x_BCHW)
            return net.forward_head(last, pre_logits=True), states
        options: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        names = self._parameters_of_forward
        if "interpolate_pos_encoding" in names and x_BCHW.shape[-1] != _side(getattr(net.config, "image_size", None)):
            options["interpolate_pos_encoding"] = True
        if {"noise", "pixel_values"} <= names:  # of a masked autoencoder, whose patches would be shuffled
            patch = _side(net.config.patch_size) or 1
            patches = (x_BCHW.shape[-2] // patch) * (x_BCHW.shape[-1] // patch)
            options["noise"] = torch.arange(patches, device=x_BCHW.device, dtype=torch.float32).expand(len(x_BCHW), -1)
        output = net(pixel_values=x_BCHW, **options) if "pixel_values" in names else net(x_BCHW, **options)
        return output, output["hidden_states"] if hidden else None

    def blocks(self) -> list[nn.Module]:
        """Returns the modules that are recomputed, gathered and compiled one at a time."""
        return [self.net.get_submodule(name) for name in self._blocks]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keeps no activations of blocks for backward; running statistics are updated once all the same."""
        if not self._blocks:
            self.left_out.append("activations are kept for backward: it has no blocks that are called one by one")
        for block in self.blocks():
            recompute_in_backward(
                block, partial(checkpoint, **{"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
            )

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations for backward."""
        for block in self.blocks():
            recompute_in_backward(block, None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Saves the module as its own library does; `loading_lines` load it without this package.

        A transformers model is saved as itself, what the run adds being in its config; a net of timm in timm's layout;
        any other as safetensors of its state dict.

        Args:
            save_directory: The folder, made if need be.
            max_shard_size: Largest file of weights, for transformers models.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.net, PreTrainedModel):
            for name, value in self.config.record().items():
                setattr(self.net.config, name, value)
            self.net.save_pretrained(folder, max_shard_size=max_shard_size)
            return
        arguments = self._timm_arguments()
        if arguments is not None:
            weights = {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            layout = self._timm_config(arguments)
        else:
            save_model(self.net, str(folder / "model.safetensors"))
            layout = {"library": "torch", "features": self.pooling, **self.description}
            layout |= {name: getattr(self.config, name) for name in ("hidden_size", "num_channels", "image_size")}
        text = json.dumps({**layout, **self.config.record()}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def loading_lines(self, folder: str | os.PathLike[str]) -> list[str]:
        """Returns lines of Python that load what was saved and make `features` (B, hidden_size) of `pixel_values`."""
        where = os.fspath(folder)
        if isinstance(self.net, PreTrainedModel):
            load = ["from transformers import AutoModel", "", f'model = AutoModel.from_pretrained("{where}")']
        elif self._timm_arguments() is not None:
            load = ["import timm", "", f'model = timm.create_model("local-dir:{where}", pretrained=True)']
        else:
            load = [*_constructor_lines(self.net), f'load_model(model, "{where}/model.safetensors")']
        reads = {
            CLASS_TOKEN: "[:, 0]",
            MEAN: ".flatten(2).mean(2)" if self._is_map else ".mean(1)",
            POOLER: ".flatten(1)",
        }
        key = "" if self._key is None else f".{self._key}" if self._attributes else f'["{self._key}"]'
        call = f"    features = model(pixel_values){key}{reads[self.pooling]}"
        return ["import torch", *load, "model.eval()", "with torch.inference_mode():", call]

    def _timm_arguments(self) -> dict[str, Any] | None:
        """Returns the arguments by which timm builds this very net; None where there are none."""
        net: Any = self.net
        name = net.pretrained_cfg.get("architecture") if self.description["library"] == "timm" else None
        if name is None or not timm.is_model(name):
            return None
        channels: dict[str, Any] = {} if self.config.num_channels == 3 else {"in_chans": self.config.num_channels}
        sizes: list[dict[str, Any]] = [{}, {"img_size": self.config.image_size}]
        wanted = _shapes(net)
        for size in sizes:
            try:
                with torch.device("meta"):
                    if _shapes(timm.create_model(name, num_classes=0, **channels, **size)) == wanted:
                        return channels | size
            except _REFUSALS:
                continue
        return None

    def _timm_config(self, arguments: dict[str, Any]) -> dict[str, Any]:
        cfg: dict[str, Any] = dict(self.net.pretrained_cfg)  # type: ignore[arg-type]
        size = self.config.image_size or cfg["input_size"][-1]
        kept = {name: cfg[name] for name in ("interpolation", "crop_pct", "mean", "std", "first_conv", "classifier")}
        return {
            "architecture": cfg["architecture"],
            "num_classes": 0,
            "num_features": self.config.hidden_size,
            "model_args": arguments,
            "pretrained_cfg": {**kept, "input_size": [self.config.num_channels, size, size], "num_classes": 0},
        }

    def _probe(
        self, image_size: int | None, num_channels: int | None, untrained: Iterable[str], trainable: bool
    ) -> None:
        """Finds the features, their number and what else the module offers, by a few forwards of two images."""
        name = self.description["name"]
        device = next(self.net.parameters()).device
        x_BCHW = self._first_images(image_size, num_channels, device)
        self.config.num_channels = x_BCHW.shape[1]
        with _evaluating(self.net):
            output, _ = self._run(x_BCHW, False)
            self._choose(output, untrained)
            first_BF = _read(output, self._key, self.pooling)
            if first_BF.ndim != 2 or len(first_BF) != len(x_BCHW) or not first_BF.is_floating_point():
                raise ValueError(
                    f"encoder: {name} gives {_shape(first_BF)} of {len(x_BCHW)} images, not (images, features)"
                )
            again, more = (
                _read(self._run(x, False)[0], self._key, self.pooling)
                for x in (x_BCHW, torch.cat([x_BCHW, x_BCHW[:1]]))
            )
            if more.shape != (len(x_BCHW) + 1, first_BF.shape[1]):
                raise ValueError(f"encoder: {name} gives {_shape(first_BF)} of 2 images, but {_shape(more)} of 3")
            if not torch.allclose(first_BF, again, rtol=1e-3, atol=1e-4 * float(first_BF.abs().max())):
                raise ValueError(
                    f"encoder: {name} gives other features of the same images: turn off dropout in evaluation"
                )
            self.config.hidden_size = first_BF.shape[1]
            self._find_stages(x_BCHW)
            self._blocks = block_names(self.net, lambda: self._run(x_BCHW, False))
        if trainable:
            self._freeze_unused(x_BCHW)

    def _first_images(self, image_size: int | None, num_channels: int | None, device: torch.device) -> Tensor:
        """Returns two images of noise that the module takes, and notes their size where the module says one."""
        own = image_size or self.config.image_size
        self.config.image_size = own
        channels, sizes = num_channels or _channels(self.net), (own,) if own is not None else _fitting_sizes(self.net)
        problem: Exception | None = None
        for size in sizes:
            noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
            x_BCHW = noise.to(device, self.dtype)
            try:
                with _evaluating(self.net):
                    self._run(x_BCHW, False)
                return x_BCHW
            except _REFUSALS as error:
                problem = problem or error
        tried = f"{channels} x {sizes[0]} x {sizes[0]}"
        reason = " ".join(str(problem).split())[:200]
        raise ValueError(f"encoder: {self.description['name']} takes no images of {tried}: {reason}")

    def _choose(self, output: Any, untrained: Iterable[str]) -> None:
        """Takes the pooled output, unless its weights are untrained; else the class token, else the mean."""
        name = self.description["name"]
        self._is_map, self._attributes = False, not isinstance(output, dict) or hasattr(output, "to_tuple")
        if isinstance(output, Tensor):
            self._key, x = None, output
        elif isinstance(output, Mapping):
            tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
            if any("pooler" in key for key in untrained):
                tensors.pop("pooler_output", None)
            keys = [key for key in _KEYS if key in tensors] or (list(tensors) if len(tensors) == 1 else [])
            if not keys:
                raise ValueError(
                    f"encoder: {name} gives {', '.join(map(str, output)) or 'nothing'}; name one of them features"
                )
            self._key = keys[0]
            x = tensors[self._key]
        else:
            raise ValueError(f"encoder: {name} gives a {type(output).__name__}, not a tensor or a dict of tensors")
        self._is_map = x.ndim == 4
        if self._key == "last_hidden_state" and x.ndim == 3:
            tokens = any(part.split(".")[-1] in _CLASS_TOKENS for part, _ in self.net.named_parameters())
            self.pooling = CLASS_TOKEN if tokens else MEAN
        elif x.ndim == 4 and self._key != "pooler_output":
            self.pooling = MEAN
        elif x.ndim == 3:
            raise ValueError(f"encoder: {name} gives {_shape(x)}, not (images, features) or a map (images, F, H, W)")

    def _find_stages(self, x_BCHW: Tensor) -> None:
        states = None
        if self.description["library"] != "torch":
            try:
                _, states = self._run(x_BCHW, True)
            except _REFUSALS:
                states = None
        if states and all(isinstance(state, Tensor) and len(state) == len(x_BCHW) for state in states):
            self.config.stage_names = [f"stage{i}" for i in range(len(states))]
        else:
            self.left_out.append("spectra of hidden layers are not measured: it gives no hidden states")

    def _freeze_unused(self, x_BCHW: Tensor) -> None:
        """Freezes weights that no feature depends on: data parallelism would wait for their gradients."""
        weights = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        if not weights:
            return
        with _evaluating(self.net), torch.enable_grad():
            features_BF = _read(self._run(x_BCHW, False)[0], self._key, self.pooling)
            gradients = torch.autograd.grad(features_BF.sum(), list(weights.values()), allow_unused=True)
        unused = [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]
        for name in unused:
            weights[name].requires_grad_(False)
        if unused:
            self.left_out.append(
                f"features do not depend on {', '.join(unused[:3])}{' ...' if unused[3:] else ''}: frozen"
            )


def adapt_encoder(
    encoder: nn.Module,
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    untrained: Iterable[str] = (),
    trainable: bool = True,
) -> Any:
    """Makes any encoder give `pooler_output` (B, F) and know its sizes; one of this package comes back as it is.

    Classifiers are removed from the module itself. Features are the pooled output, where the module has one, else the
    class token, else the mean over positions; a map (B, C, H, W) is averaged.

    Args:
        encoder: A transformers model, a net of timm or torchvision, or any module that maps images (B, C, H, W) to
            features, as a tensor or in a dict.
        image_size: Side of its images in pixels, where it cannot be found out.
        num_channels: Channels of its images, where they cannot be found out.
        untrained: Names of weights that its checkpoint lacked; a pooler among them is not used.
        trainable: Freezes the weights that no feature depends on.

    Returns:
        The encoder, or an `EncoderAdapter` around it.

    Raises:
        ValueError: It does not give features of images alone, or not the same features of the same images.
    """
    if isinstance(encoder, EncoderAdapter):
        return encoder
    if isinstance(encoder, SSLPreTrainedModel):
        return encoder.base_model
    net, removed = _without_head(encoder)
    _check_parameters(net)
    library, name, size = _origin(net)
    adapter = EncoderAdapter(net, library, name)
    adapter.left_out += removed
    adapter.config.image_size = size
    _check_signature(net, name)
    with torch.random.fork_rng(devices=[]):
        adapter._probe(image_size, num_channels, untrained, trainable)
    return adapter


def patch_side(encoder: Any) -> int:
    """Returns the side of an encoder's patches in pixels, of which its images are multiples; 1 where it has none."""
    net = getattr(encoder, "net", None) or getattr(encoder, "timm_model", encoder)
    owners = (encoder.config, getattr(net, "config", None), getattr(net, "patch_embed", None))
    sides = (_side(getattr(owner, "patch_size", None)) for owner in owners)
    return next((side for side in sides if side is not None), 1)


def refused_size(encoder: nn.Module, side: int) -> str | None:
    """Says why an encoder, adapted, takes no images of a size, tried on two of them; None where it does."""
    weight, config = next(encoder.parameters()), cast(Any, encoder.config)
    x_BCHW = torch.zeros(2, config.num_channels, side, side, device=weight.device, dtype=weight.dtype)
    try:
        with _evaluating(encoder), torch.random.fork_rng(devices=[]):
            encoder(x_BCHW)
    except _REFUSALS as error:
        return " ".join(str(error).split())[:150] or type(error).__name__
    return None


def _without_head(net: Any) -> tuple[nn.Module, list[str]]:
    """Removes a classifier, or the half of a model that sees no images."""
    removed = []
    if isinstance(net, PreTrainedModel):
        for part in (
            net.base_model,
            getattr(net, "vision_model", None),
            getattr(net.base_model, "vision_model", None),
        ):
            if part is not None and part is not net and _is_encoder(part):
                removed.append(f"only the {type(part).__name__} of {type(net).__name__} is used")
                net = part
        if getattr(net.config if isinstance(net, PreTrainedModel) else None, "mask_ratio", 0):
            net.config.mask_ratio = 0.0
            removed.append("no patches are masked: mask_ratio is 0 now")
    if _is_timm(net) and net.num_classes:
        net.reset_classifier(0)
        removed.append("its classifier is removed")
    elif type(net).__module__.startswith("torchvision.models"):
        removed += _without_last_linear(net)
    return net, removed


def _is_encoder(part: nn.Module) -> bool:
    takes_images = isinstance(part, PreTrainedModel) and "pixel_values" in inspect.signature(part.forward).parameters
    return takes_images or _is_timm(part)


def _is_timm(net: nn.Module) -> bool:
    methods = ("forward_features", "forward_head", "reset_classifier")
    return bool(getattr(net, "pretrained_cfg", None)) and all(hasattr(net, name) for name in methods)


def _without_last_linear(net: nn.Module) -> list[str]:
    """Replaces the linear layer that gives a torchvision net's output, if one does, and its auxiliary classifiers."""
    for name in ("aux1", "aux2", "AuxLogits"):
        if getattr(net, name, None) is not None:
            setattr(net, name, None)
            net.aux_logits = False  # type: ignore[assignment]
    outputs: dict[str, Any] = {}
    linears = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_hook(lambda *args, name=name: outputs.__setitem__(name, args[2]))
        for name, module in linears.items()
    ]
    parameter = next(net.parameters())
    try:
        with _evaluating(net):
            output = net(torch.zeros(2, _channels(net), 224, 224, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    last = next((name for name, value in outputs.items() if value is output), None)
    if last is None:
        return []
    owner, _, attribute = last.rpartition(".")
    parent = net.get_submodule(owner)
    setattr(parent, attribute, nn.Identity())
    return ["its classifier is removed"]


def _check_parameters(net: nn.Module) -> None:
    name = type(net).__name__
    parameters = dict(net.named_parameters())
    if not parameters:
        raise ValueError(f"encoder: {name} has no parameters")
    for key, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(f"encoder: {name}.{key} is lazy; run it once on images of the right size")
        if parameter.is_meta:
            raise ValueError(f"encoder: {name}.{key} is on the meta device; load its weights")
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"encoder: {name}.{key} is of {parameter.dtype}, which cannot be trained; load it in float32"
            )


def _check_signature(net: nn.Module, name: str) -> None:
    """Refuses what does not take images alone."""
    parameters = inspect.signature(net.forward).parameters
    if isinstance(net, PreTrainedModel) and "pixel_values" not in parameters:
        raise ValueError(f"encoder: {name} takes {next(iter(parameters))}, not images")
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [key for key, p in parameters.items() if p.default is p.empty and p.kind not in kinds]
    if not parameters or len(needed) > 1:
        raise ValueError(f"encoder: {name} needs {', '.join(needed) or 'nothing'}; an encoder takes images alone")


def _origin(net: Any) -> tuple[str, str, int | None]:
    """Returns the library, the name and the image size of a module, None where it does not say."""
    if isinstance(net, PreTrainedModel):
        name = net.config.name_or_path or type(net).__name__
        return "transformers", name, _side(getattr(net.config, "image_size", None))
    if _is_timm(net):
        size = getattr(getattr(net, "patch_embed", None), "img_size", None) or net.pretrained_cfg["input_size"][-1]
        return "timm", net.pretrained_cfg["architecture"], _side(size)
    return "torch", type(net).__name__, _side(getattr(net, "image_size", None))


def _side(size: Any) -> int | None:
    side = size[0] if isinstance(size, list | tuple) and size else size
    return side if isinstance(side, int) and side > 0 else None


def _channels(net: Any) -> int:
    """Returns the channels of images, from the configuration or the first convolution."""
    known = getattr(getattr(net, "config", None), "num_channels", None)
    if isinstance(known, int):
        return known
    convolutions = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    return next((module.in_channels for module in convolutions), 3)


def _fitting_sizes(net: nn.Module) -> tuple[int, ...]:
    """Returns sizes to try, first the one of which a linear layer takes all pixels."""
    first = next((module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)), None)
    if not isinstance(first, nn.Linear):
        return _SIZES
    sides = [math.isqrt(first.in_features // channels) for channels in (3, 1) if first.in_features % channels == 0]
    return (*(side for side in sides if side * side * 3 == first.in_features), *_SIZES)


def _read(output: Any, key: str | None, pooling: str) -> Tensor:
    x = output if key is None else output[key]
    if pooling == CLASS_TOKEN:
        return x[:, 0]
    if pooling == MEAN:
        return x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1)
    return x.flatten(1) if x.ndim > 1 else x


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Runs a module in evaluation mode without gradients, and gives each part its mode back."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def _class_name(net: nn.Module) -> str:
    return f"{type(net).__module__}.{type(net).__qualname__}"


def _constructor_lines(net: nn.Module) -> list[str]:
    """Returns lines that build a module as it is now, as far as that can be known."""
    module, name = type(net).__module__, type(net).__qualname__
    imports = ["from safetensors.torch import load_model"]
    if (built := _torchvision_builder(net)) is not None:
        builder, arguments, emptied = built
        lines = [f"model = torchvision.models.{builder}({arguments})"]
        parts = (re.sub(r"\.(\d+)", r"[\1]", part) for part in emptied)
        return ["import torchvision", *imports, "", *lines, *(f"model.{part} = torch.nn.Identity()" for part in parts)]
    if module != "__main__":
        imports.append(f"from {module} import {name.partition('.')[0]}")
    arguments = "()" if _takes_no_arguments(net) else "(...)  # the arguments that it was made with"
    return [*imports, "", f"model = {name}{arguments}"]


def _takes_no_arguments(net: nn.Module) -> bool:
    try:
        with torch.device("meta"):
            return _shapes(type(net)()) == _shapes(net)
    except _REFUSALS:
        return False


def _torchvision_builder(net: nn.Module) -> tuple[str, str, list[str]] | None:
    """Finds torchvision's function that builds a net of these shapes, and what of it was replaced by nothing."""
    if not type(net).__module__.startswith("torchvision.models"):
        return None
    wanted, emptied = _shapes(net), [name for name, part in net.named_modules() if type(part) is nn.Identity]
    for name in torchvision.models.list_models():
        builder: Callable[..., Any] = torchvision.models.get_model_builder(name)
        if builder.__module__ != type(net).__module__:
            continue
        options = {"aux_logits": False} if "aux_logits" in inspect.signature(type(net)).parameters else {}
        with torch.device("meta"):
            whole = builder(weights=None, **options)
        gone = (
            [part for part in emptied if isinstance(whole.get_submodule(part), nn.Linear)]
            if _has(whole, emptied)
            else []
        )
        kept = {
            key: shape
            for key, shape in _shapes(whole).items()
            if not key.startswith(tuple(f"{part}." for part in gone))
        }
        if kept == wanted:
            return name, ", ".join(f"{key}={value}" for key, value in options.items()), gone
    return None


def _has(net: nn.Module, names: list[str]) -> bool:
    parts = {name for name, _ in net.named_modules()}
    return all(name in parts for name in names)
