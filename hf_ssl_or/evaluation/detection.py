"""Encoders in torchvision's detectors, and a reader of Pascal VOC's folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import torch
from PIL import Image
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import PreTrainedModel

from hf_ssl_or.errors import InputError, unknown

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class PyramidBackbone(nn.Module):
    """A transformers backbone and a feature pyramid: what `torchvision.models.detection.FasterRCNN` and its kin take.

    Several maps, as a ResNet's stages give them, are joined by a feature pyramid network (Lin et al., CVPR 2017), with
    a coarser level pooled on top. A single map, as a ViT's last block gives it, is brought to 4, 2, 1 and 1/2 of its
    resolution (Li et al., "Exploring plain vision transformer backbones for object detection", ECCV 2022).

    Example:
        ```python
        backbone = SSLResNetBackbone.from_pretrained(folder, out_features=["stage1", "stage2", "stage3", "stage4"])
        pyramid = PyramidBackbone(backbone)
        sizes = tuple((32 * 2**level,) for level in range(pyramid.levels))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * pyramid.levels)
        pool = MultiScaleRoIAlign(pyramid.names, output_size=7, sampling_ratio=2)
        detector = FasterRCNN(pyramid, num_classes, rpn_anchor_generator=anchors, box_roi_pool=pool)
        ```

    Args:
        backbone: Returns `feature_maps`, finest first, of the widths in `channels`.
        width: Channels of every level.

    Attributes:
        out_channels: The width, by the name that torchvision reads.
        levels: Number of levels.
        names: Keys of the levels that boxes are pooled from.
    """

    def __init__(self, backbone: PreTrainedModel, width: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = backbone, width
        channels: list[int] = list(cast(Any, backbone).channels)
        self.neck: nn.Module
        if len(channels) == 1:
            self.neck, self.levels = _SimplePyramid(channels[0], width), 4
            self.names = ["0", "1", "2", "3"]
        else:
            self.neck, self.levels = FeaturePyramidNetwork(channels, width, LastLevelMaxPool()), len(channels) + 1
            self.names = [str(level) for level in range(len(channels))]

    def forward(self, images_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Returns every level's map (B, width, H', W') of normalized images, finest first."""
        maps = self.body(images_BCHW).feature_maps
        return self.neck(OrderedDict((str(level), x) for level, x in enumerate(maps)))


class _SimplePyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the resolution of one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        doubled = nn.ConvTranspose2d(channels, half, 2, stride=2)
        fourfold = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, stride=2)
        )
        scaled = ((fourfold, quarter), (doubled, half), (nn.Identity(), channels), (nn.MaxPool2d(2), channels))
        self.levels = nn.ModuleList(
            nn.Sequential(scale, _convolution(before, width, 1), _convolution(width, width, 3))
            for scale, before in scaled
        )

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        (x_BCHW,) = maps.values()
        return OrderedDict((str(i), level(x_BCHW)) for i, level in enumerate(self.levels))


def _convolution(before: int, after: int, size: int) -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(1, channels)  # over channels and places, whatever the size of the batch

    return Conv2dNormActivation(before, after, size, norm_layer=norm, activation_layer=None)


def build_c4_detector(encoder: PreTrainedModel, num_classes: int, **options: Any) -> FasterRCNN:
    """Builds Faster R-CNN "C4" on a ResNet, as MoCo's detection does (He et al., CVPR 2020).

    Proposals come from the third of four stages (stride 16). Boxes are cut from the same map at 14x14 and go through
    the fourth stage, a batch norm that is new, and average pooling to the linear layers. The weights of all stages are
    those of the encoder, in the same tensors, and all are trained. From detectron2's C4 it differs in the losses of
    boxes, which are torchvision's (smooth L1 with beta 1/9 in place of L1).

    Args:
        encoder: An `SSLResNetModel`.
        num_classes: Classes and the background.
        options: More of `FasterRCNN`, as `min_size` and `image_mean`.

    Returns:
        The detector; `backbone` and `roi_heads.box_head` have timm's names of the stages.

    Raises:
        InputError: The encoder has not four stages of strides 4 to 32.
    """
    stem_and_stages, last_stage, width, last_width = _split_resnet(encoder)
    cast(Any, stem_and_stages).out_channels = width
    norm = nn.BatchNorm2d(last_width)
    box_head = OrderedDict(layer4=last_stage, norm=norm, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    predictor = FastRCNNPredictor(last_width, num_classes)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return FasterRCNN(
        stem_and_stages,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        box_roi_pool=_AlignedPool(["0"], output_size=14, sampling_ratio=0),
        box_head=nn.Sequential(box_head),
        box_predictor=predictor,
        **options,
    )


def _split_resnet(encoder: PreTrainedModel) -> tuple[nn.Module, nn.Module, int, int]:
    """Returns the stem with three stages, the fourth stage, and the channels of both."""
    net: Any = getattr(encoder, "timm_model", None)
    strides = [info["reduction"] for info in net.feature_info[1:]] if isinstance(net, ResNet) else []
    if strides != [4, 8, 16, 32] or getattr(encoder.config, "stem", None) != "standard":
        raise InputError("head c4: takes a ResNet of four stages with the standard stem; take the pyramid for others")
    names = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3")
    first = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))
    return first, net.layer4, net.feature_info[3]["num_chs"], net.feature_info[4]["num_chs"]


class _AlignedPool(MultiScaleRoIAlign):
    """RoIAlign on one map of stride 16, without torchvision's offset of half a pixel: detectron2's `ROIAlignV2`."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Cuts boxes (n, 4) of each image, in pixels, from the map: (sum of n, C, 14, 14)."""
        size = cast(tuple[int, int], tuple(self.output_size))
        return roi_align(x["0"], boxes, size, 1 / 16, self.sampling_ratio, aligned=True)


@torch.no_grad()
def update_batch_norm(detector: nn.Module, batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]]) -> None:
    """Sets the running statistics of all batch norms to their mean over the batches, with the weights as they are."""
    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    detector.train()
    for images, targets in batches:
        detector(images, targets)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class VOCDetection(Dataset[dict[str, Any]]):
    """Images of Pascal VOC with their objects, in the form of the `objects` column of detection sets on the Hub.

    An item has `image`, an RGB image, and `objects`: `bbox` (x, y, width, height in pixels from 0), `category` (index
    in `VOC_CLASSES`) and `difficult`. Annotations are read at once, images when asked for.

    Args:
        splits: Folders such as VOC2007, each with the name of a list of `ImageSets/Main`.

    Raises:
        InputError: A folder, list, image or annotation is missing, or an annotation cannot be read.
    """

    def __init__(self, splits: Sequence[tuple[Path, str]]) -> None:
        self.images: list[Path] = []
        self.objects: list[dict[str, list[Any]]] = []
        for folder, split in splits:
            for name in _read_names(folder, split):
                image = folder / "JPEGImages" / f"{name}.jpg"
                if not image.is_file():
                    raise InputError(f"{image}: missing, but {split}.txt names it")
                self.images.append(image)
                self.objects.append(read_voc_objects(folder / "Annotations" / f"{name}.xml"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(self.images[index]) as image:
            return {"image": image.convert("RGB"), "objects": self.objects[index]}


def load_voc(folder: Path) -> tuple[VOCDetection, VOCDetection]:
    """Returns the training images of VOC07+12 (of VOC07 where VOC2012 is not there), and the test images of VOC07.

    Args:
        folder: Holds VOC2007 and perhaps VOC2012, or a VOCdevkit with these.

    Raises:
        InputError: As `VOCDetection`.
    """
    if (folder / "VOCdevkit").is_dir():
        folder = folder / "VOCdevkit"
    first, second = folder / "VOC2007", folder / "VOC2012"
    train = [(year, "trainval") for year in (first, second) if year == first or year.is_dir()]
    return VOCDetection(train), VOCDetection([(first, "test")])


def read_voc_objects(path: Path) -> dict[str, list[Any]]:
    """Returns the boxes (x, y, width, height in pixels from 0), categories and difficulty of an annotation.

    VOC counts pixels from 1 and includes the last one, so a box of one pixel has equal corners. The standard library's
    parser fetches nothing: an external entity is an error.

    Raises:
        InputError: The file is missing, is not an annotation, has an unknown class or an empty box.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: cannot be read as an annotation of VOC: {error}") from None
    if root.tag != "annotation":
        raise InputError(f"{path}: no annotation of VOC, its root is <{root.tag}>")
    objects: dict[str, list[Any]] = {"bbox": [], "category": [], "difficult": []}
    for item in root.findall("object"):
        name = item.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise InputError(f"{path}: {unknown('class', name, VOC_CLASSES)}")
        try:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            raise InputError(f"{path}: a {name} without the four numbers of its bndbox") from None
        box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
        if not 0 < min(box[2:]) <= max(box[2:]) < float("inf"):
            raise InputError(f"{path}: the box of a {name} is empty")
        objects["bbox"].append(box)
        objects["category"].append(VOC_CLASSES.index(name))
        objects["difficult"].append(item.findtext("difficult", "0").strip() == "1")
    return objects


def _read_names(folder: Path, split: str) -> list[str]:
    for part in ("JPEGImages", "Annotations"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder / part}: no such folder; VOC has JPEGImages, Annotations and ImageSets/Main")
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise InputError(f"{path}: missing; it names the images of the split")
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
