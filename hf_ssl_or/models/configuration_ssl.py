"""Configurations: the orthogonality settings of a run, and the three families of encoders that carry them."""

import copy
import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import timm
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


@strict
@dataclass(kw_only=True)
class OrthogonalityConfig:
    """How the weights of an encoder are kept near orthogonal (He, Du, Ma, NeurIPS 2024; Bansal et al., NeurIPS 2018).

    G is the smaller Gram of a weight matrix, and c the mean of its eigenvalues.

    Attributes:
        penalty: Soft orthogonality "so", its spectral norm "srip", double-sided "dso", "mutual_coherence", or "none".
        weight: Factor of the summed penalty in the loss; "auto" takes the paper's value for the encoder.
        strength: Instead of a weight: the penalty moves the weights in a step of its own after the optimizer's, so
            that over the run a small deviation which nothing else feeds shrinks by exp(-strength) (SO and SRIP only).
        target: Where G is drawn to: the "identity"; c times the identity, whatever c, with "scaled"; eigenvalues of
            G / c inside of `band` with "relaxed" (SO only); what G is when the run starts, with "start" (SO only).
        band: Lowest and highest eigenvalue of G / c that "relaxed" leaves alone; None takes [0.5, 1.5].
        normalize: Divide each matrix's penalty by its size, so that one weight suits small and large encoders.
        power_iterations: Power iterations per evaluation of the spectral norm (SRIP only).
        fresh_start: Start each power iteration at a random vector instead of the last step's (SRIP only); with two
            iterations, the paper's estimate.
        schedule: How the weight changes during the run: "constant", the "step" decay of Bansal et al., or "cosine".
            A strength keeps its sum, and is spread over the run by this and by the learning rate.
        every: The penalty acts at every so many steps.
        include: Glob patterns of the parameter names to take; empty for all convolution and linear weights.
        exclude: Glob patterns of the parameter names to leave out.
        split_qkv: Treat the query, key and value rows of a fused attention weight as three matrices.
        seed: Seed of the power iteration's vectors.

    Raises:
        ValueError: A value is out of range.
    """

    penalty: Literal["none", "so", "srip", "dso", "mutual_coherence"] = "so"
    weight: float | int | Literal["auto"] = "auto"
    strength: float | int | None = None
    target: Literal["identity", "scaled", "relaxed", "start"] = "identity"
    band: list[float | int] | None = None
    normalize: bool = False
    power_iterations: int = 1
    fresh_start: bool = False
    schedule: Literal["constant", "step", "cosine"] = "constant"
    every: int = 1
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    split_qkv: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight != "auto" and not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: a finite number of at least 0 or 'auto', not {self.weight}")
        for name, least in (("power_iterations", 1), ("every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least}, not {getattr(self, name)}")
        if self.strength is not None and not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength: a finite number of at least 0, not {self.strength}")
        if self.strength is not None and self.weight != "auto":
            raise ValueError("weight and strength: give one; a strength goes without a weight (or with weight: auto)")
        if self.band is not None and not (len(self.band) == 2 and 0 <= self.band[0] < 1 < self.band[1] < float("inf")):
            raise ValueError(f"band: [low, high] with 0 <= low < 1 < high, not {self.band}")
        if self.penalty != "none":
            self._check_form()

    def _check_form(self) -> None:
        """Refuses what has no meaning together."""
        if self.target in ("relaxed", "start") and self.penalty != "so":
            raise ValueError(f"target: {self.target} is a form of penalty: so, not of {self.penalty}")
        if self.band is not None and self.target != "relaxed":
            raise ValueError(f"band: goes with target: relaxed, not with {self.target}")
        if self.strength is None:
            return
        if self.penalty not in ("so", "srip"):
            raise ValueError(f"strength: goes with penalty: so or srip, not with {self.penalty}")
        if self.normalize:
            raise ValueError("strength: means the same for matrices of every size; leave normalize false")
        if self.fresh_start:
            raise ValueError("strength: srip moves along the vector of the steps before; leave fresh_start false")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OrthogonalityConfig":
        """Makes the settings from `to_dict`'s answer, or part of it.

        Raises:
            ValueError: A key is unknown, or a value has the wrong type or range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"orthogonality: unknown key {key!r}, the keys are {', '.join(known)}")
        try:
            return cls(**values)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"orthogonality: {' '.join(str(error).split())}") from error


# Wide ResNet-28-2 of Zagoruyko & Komodakis (2016) is timm's pre-activation ResNet with basic blocks, to the weight.
OWN_RESNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide_resnet28_2": ("resnetv2_18", {"layers": [4, 4, 4], "channels": [32, 64, 128], "stem_chs": 16}),
}
SHORT_VITS = {name: f"{name}_patch16_224" for name in ("vit_tiny", "vit_small", "vit_base")}

_TRANSFORMERS_KEYS = (
    *("auto_map", "out_features", "out_indices", "stage_names", "num_labels", "name_or_path", "torch_dtype"),
    *("output_attentions", "attn_implementation", "experts_implementation", "per_layer_config", "quantization_config"),
    *("_name_or_path", "_commit_hash", "_attn_implementation_internal", "_experts_implementation_internal"),
)
_TIMM_KEYS = ("pretrained_cfg", "num_classes", "label_names")
_PIPELINES = {
    "image-feature-extraction": {"impl": "pipeline_ssl.SSLImageFeatureExtractionPipeline", "pt": ["AutoModel"]},
    "image-classification": {
        "impl": "pipeline_ssl.SSLImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
    },
}
# Code in a folder of the Hub, which transformers runs under this name. The package's own pipelines need no trust.
_IS_REMOTE = __name__.startswith("transformers_modules.")


def list_architectures(model_type: str) -> list[str]:
    """Lists the architectures of a family, our own names first; of "ssl_timm", all that timm has."""
    if model_type == "ssl_resnet":
        return [*OWN_RESNETS, *timm.list_models(module="resnet")]
    if model_type == "ssl_vit":
        return [*SHORT_VITS, *timm.list_models(module="vision_transformer")]
    return timm.list_models()


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the hint about the nearest known name, to end an error message with."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


@lru_cache(maxsize=64)
def _outline(architecture: str, arguments: str) -> Any:
    """Builds timm's net on the meta device: its shapes without its memory."""
    with torch.device("meta"):
        return timm.create_model(architecture, **json.loads(arguments))


@strict
class SSLConfig(BackboneConfigMixin, PreTrainedConfig):
    """What all families of encoders share.

    Attributes:
        architecture: A timm name, or one of our own.
        image_size: Side of the square images in pixels; None takes the architecture's.
        num_channels: Channels of an image.
        hidden_size: Number of features, derived from the architecture; a value that contradicts it is an error.
        orthogonality: How the weights were or are to be kept near orthogonal; a dict is converted.
        pretraining: Where the weights come from, in plain values.
        preprocessing: What became of pixels in training: range of values, size, crop, mean, in plain values. The
            image processor does the same.
        model_args: Further keyword arguments of the timm model, in plain values.

    Raises:
        ValueError: A name, a key or a value is unknown, out of range or refused by timm.
    """

    architecture: str = ""
    image_size: int | None = None
    num_channels: int = 3
    hidden_size: int | None = None
    orthogonality: OrthogonalityConfig | dict[str, Any] | None = None
    pretraining: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    timm_classes: ClassVar[tuple[type, ...]] = ()
    fixed_arguments: ClassVar[tuple[str, ...]] = ("num_classes", "in_chans", "pretrained", "features_only")

    def __post_init__(self, **kwargs: Any) -> None:
        if "model_type" in kwargs:  # a saved configuration, perhaps of a newer version
            kwargs = self._without_others(kwargs)
        else:
            self._refuse_unknown(kwargs)
        self._check_values()
        net = self.outline()
        if self.hidden_size not in (None, net.head_hidden_size):
            raise ValueError(f"hidden_size: {self.architecture} has {net.head_hidden_size}, not {self.hidden_size}")
        self.hidden_size = net.head_hidden_size
        self._complete(net)
        name = type(self).__name__.removesuffix("Config")
        module = f"modeling_{self.model_type}"
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_ssl.{name}Config",
            "AutoModel": f"{module}.{name}Model",
            "AutoModelForImageClassification": f"{module}.{name}ForImageClassification",
            "AutoBackbone": f"{module}.{name}Backbone",
        }
        if _IS_REMOTE:
            kwargs["custom_pipelines"] = copy.deepcopy(_PIPELINES)
        self.stage_names = self._stage_names(net)
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "orthogonality" and isinstance(value, dict):
            value = OrthogonalityConfig.from_dict(value)
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        output = super().to_dict()
        if isinstance(self.orthogonality, OrthogonalityConfig):
            output["orthogonality"] = self.orthogonality.to_dict()
        output["custom_pipelines"] = copy.deepcopy(_PIPELINES)
        return output

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        """Returns the name and the keyword arguments with which `timm.create_model` builds this net."""
        return self.architecture, {"num_classes": 0, "in_chans": self.num_channels, **self.model_args}

    def outline(self) -> Any:
        """Returns timm's net on the meta device (shared: not to be changed), which knows every shape."""
        name, arguments = self.timm_arguments()
        if not timm.is_model(name) or "." in name:
            known = list_architectures(self.model_type)
            raise ValueError(f"architecture: unknown name {self.architecture!r}{nearest(self.architecture, known)}")
        try:
            net = _outline(name, json.dumps(arguments, sort_keys=True))
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"timm refuses {name} with {arguments}: {error}") from error
        if self.timm_classes and type(net) not in self.timm_classes:
            raise ValueError(f"architecture: {name} is a {type(net).__name__}, not of the family {self.model_type}")
        return net

    def _without_others(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Drops what a published configuration says to timm and to transformers' pipelines alone."""
        self.model_args = {key: value for key, value in self.model_args.items() if key not in self.fixed_arguments}
        return {key: value for key, value in kwargs.items() if key not in (*_TIMM_KEYS, "custom_pipelines")}

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = [f.name for f in dataclasses.fields(self)]
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                raise ValueError(f"{type(self).__name__}: unknown key {key!r}{nearest(key, known)}")

    def _check_values(self) -> None:
        for name in ("image_size", "num_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: at least 1, not {value}")
        for name in self.fixed_arguments:
            if name in self.model_args:
                raise ValueError(f"model_args: {name!r} is set by the configuration itself")

    def _complete(self, net: Any) -> None:
        raise NotImplementedError

    def _stage_names(self, net: Any) -> list[str]:
        return ["stem"] + [f"stage{i + 1}" for i in range(self._num_stages(net))]

    def _num_stages(self, net: Any) -> int:
        raise NotImplementedError


@strict
class SSLResNetConfig(SSLConfig):
    """An encoder of timm's class `ResNet`, or "wide_resnet28_2".

    "wide_resnet28_2" is the pre-activation Wide ResNet-28-2 that semi- and self-supervised papers use on CIFAR: a 3x3
    stem of 16 channels and three stages of four basic blocks, exactly, by timm's `ResNetV2`.

    Attributes:
        stem: "standard" (timm's), or "small": 3x3, stride 1, no max-pool, for images of 32-64 pixels. None takes the
            architecture's own.
        channels: Width of each stage (before a bottleneck's expansion by 4); None takes the architecture's.
    """

    model_type = "ssl_resnet"
    timm_classes: ClassVar[tuple[type, ...]] = (ResNet, ResNetV2)
    fixed_arguments: ClassVar[tuple[str, ...]] = (*SSLConfig.fixed_arguments, "channels")

    architecture: str = "resnet18"
    stem: Literal["standard", "small"] | None = None
    channels: list[int] | None = None

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        """Returns the name and the keyword arguments with which `timm.create_model` builds this net, stem apart."""
        _, arguments = super().timm_arguments()
        name, own = OWN_RESNETS.get(self.architecture, (self.architecture, {}))
        if self.channels is not None:
            arguments["channels"] = self.channels
        return name, {**own, **arguments}

    def _check_values(self) -> None:
        super()._check_values()
        stages = len(OWN_RESNETS[self.architecture][1]["channels"]) if self.architecture in OWN_RESNETS else 4
        if self.channels is not None and (len(self.channels) != stages or min(self.channels) < 1):
            raise ValueError(f"channels: {stages} widths of at least 1, not {self.channels}")
        if self.stem is None:
            self.stem = "small" if self.architecture in OWN_RESNETS else "standard"
        elif self.stem == "standard" and self.architecture in OWN_RESNETS:
            raise ValueError(f"stem: {self.architecture} has the small stem only")

    def _complete(self, net: Any) -> None:
        if (type(net) is ResNetV2) != (self.architecture in OWN_RESNETS):
            raise ValueError(f"architecture: {self.architecture} is a ResNetV2, not of the family {self.model_type}")
        if self.image_size is None:
            self.image_size = 32 if self.stem == "small" else net.default_cfg["input_size"][-1]

    def _num_stages(self, net: Any) -> int:
        return len(net.feature_info) - 1


@strict
class SSLViTConfig(SSLConfig):
    """An encoder of timm's class `VisionTransformer`; "vit_tiny", "vit_small" and "vit_base" are short names.

    Attributes:
        patch_size: Side of a patch in pixels; None takes the architecture's.
        pooling: Which features represent the image: the class "token" or the "avg" of the patches; None takes the
            architecture's.
    """

    model_type = "ssl_vit"
    timm_classes: ClassVar[tuple[type, ...]] = (VisionTransformer,)
    fixed_arguments: ClassVar[tuple[str, ...]] = (
        *SSLConfig.fixed_arguments,
        "img_size",
        "patch_size",
        "global_pool",
        "dynamic_img_size",
    )

    architecture: str = "vit_small"
    patch_size: int | None = None
    pooling: Literal["token", "avg"] | None = None

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        """Returns the name and the keyword arguments with which `timm.create_model` builds this net."""
        name, arguments = super().timm_arguments()
        own = {"img_size": self.image_size, "patch_size": self.patch_size, "global_pool": self.pooling}
        own = {key: value for key, value in own.items() if value is not None}
        return SHORT_VITS.get(name, name), {**own, "dynamic_img_size": True, **arguments}

    def _check_values(self) -> None:
        super()._check_values()
        if self.patch_size is not None and self.patch_size < 1:
            raise ValueError(f"patch_size: at least 1 pixel, not {self.patch_size}")

    def _complete(self, net: Any) -> None:
        self.image_size, self.patch_size = net.patch_embed.img_size[0], net.patch_embed.patch_size[0]
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if net.global_pool not in ("token", "avg"):
            raise ValueError(f"pooling: {self.architecture} pools by {net.global_pool!r}, set 'token' or 'avg'")
        self.pooling = net.global_pool

    def _num_stages(self, net: Any) -> int:
        return len(net.blocks)


@strict
class SSLTimmConfig(SSLConfig):
    """An encoder of any architecture of timm; of ResNets and vision transformers the other two families do more."""

    model_type = "ssl_timm"
    fixed_arguments: ClassVar[tuple[str, ...]] = (*SSLConfig.fixed_arguments, "img_size")

    architecture: str = "convnext_atto"

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        """Returns the name and the keyword arguments with which `timm.create_model` builds this net."""
        name, arguments = super().timm_arguments()
        size = self.image_size
        if size is not None and timm.is_model(name) and size != _own_size(name) and _takes_image_size(name):
            arguments["img_size"] = size
        return name, arguments

    def _complete(self, net: Any) -> None:
        if self.image_size is None:
            self.image_size = _own_size(self.architecture)

    def _stage_names(self, net: Any) -> list[str]:
        return [f"stage{i + 1}" for i in range(self._num_stages(net))]

    def _num_stages(self, net: Any) -> int:
        return len(net.feature_info)


def _own_size(architecture: str) -> int:
    """Returns the side of the images that timm's first weights of an architecture are for."""
    known = timm.models.get_pretrained_cfg(architecture)
    return 224 if known is None else known.input_size[-1]


@lru_cache(maxsize=64)
def _takes_image_size(architecture: str) -> bool:
    """Says whether a net is built for one size of images; the others take any."""
    try:
        _outline(architecture, json.dumps({"img_size": _own_size(architecture), "num_classes": 0}))
    except TypeError:
        return False
    return True


SSLResNetConfig.register_for_auto_class()
SSLViTConfig.register_for_auto_class()
SSLTimmConfig.register_for_auto_class()
