"""Our backbones in torchvision's Faster R-CNN and in detectors of transformers; VOC's format."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou
from transformers import (
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
)

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.detection import (
    VOC_CLASSES,
    PyramidBackbone,
    VOCDetection,
    build_c4_detector,
    load_voc,
    read_voc_objects,
    update_batch_norm,
)
from hf_ssl_or.models import (
    SSLResNetBackbone,
    SSLResNetConfig,
    SSLResNetModel,
    SSLViTBackbone,
    SSLViTConfig,
    SSLViTModel,
)
from tests.voc import SQUARE, write_annotation, write_voc

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SLIM = {"channels": [8, 16, 32, 64], "model_args": {"zero_init_last": False}}


def resnet(**options) -> SSLResNetBackbone:
    torch.manual_seed(0)
    return SSLResNetBackbone(SSLResNetConfig(**SLIM, **options))


def vit() -> SSLViTBackbone:
    torch.manual_seed(0)
    config = SSLViTConfig(architecture="vit_tiny", image_size=64, patch_size=16, model_args={"depth": 2})
    return SSLViTBackbone(config)


def faster_rcnn(pyramid: PyramidBackbone, num_classes: int) -> FasterRCNN:
    torch.manual_seed(0)
    sizes = tuple((16 * 2**level,) for level in range(pyramid.levels))
    return FasterRCNN(
        pyramid,
        num_classes,
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes, ((1.0,),) * pyramid.levels),
        box_roi_pool=MultiScaleRoIAlign(pyramid.names, output_size=3, sampling_ratio=1),
        box_batch_size_per_image=32,
    )


@pytest.mark.parametrize(("backbone", "sides"), [(resnet, [24, 12, 6, 3, 2]), (vit, [24, 12, 6, 3])])
def test_levels_of_the_pyramid(backbone, sides: list[int]) -> None:
    body = backbone() if backbone is vit else resnet(out_features=STAGES)
    pyramid = PyramidBackbone(body, 12)
    levels = pyramid(torch.randn(2, 3, 96, 96))
    assert [tuple(x.shape) for x in levels.values()] == [(2, 12, side, side) for side in sides]
    assert pyramid.levels == len(sides) and pyramid.out_channels == 12
    assert set(pyramid.names) < set(levels) or pyramid.names == list(levels)


def test_the_feature_pyramid_by_hand() -> None:
    """The coarsest level is a 1x1 and a 3x3 convolution of the last stage; each finer one adds the level above."""
    pyramid = PyramidBackbone(resnet(out_features=STAGES), 12).eval()
    images = torch.randn(1, 3, 64, 64)
    maps, levels = pyramid.body(images).feature_maps, pyramid(images)
    states = pyramid.body.encoder(images, output_hidden_states=True).hidden_states[1:]
    assert all(torch.equal(x, y) for x, y in zip(maps, states, strict=True))
    inner, outer = pyramid.neck.inner_blocks, pyramid.neck.layer_blocks
    top = inner[3](maps[3])
    torch.testing.assert_close(levels["3"], outer[3](top))
    below = inner[2](maps[2]) + torch.nn.functional.interpolate(top, size=maps[2].shape[-2:], mode="nearest")
    torch.testing.assert_close(levels["2"], outer[2](below))


@pytest.mark.parametrize("backbone", [lambda: resnet(out_features=STAGES), vit])
def test_faster_rcnn_learns_a_square(backbone) -> None:
    """One image, one box: the loss falls, every part of the encoder gets a gradient, and the box is found."""
    detector = faster_rcnn(PyramidBackbone(backbone(), 16), 2)
    image = torch.full((3, 96, 96), 0.2)
    image[:, 30:62, 40:72] = 0.9
    target = {"boxes": torch.tensor([[40.0, 30.0, 72.0, 62.0]]), "labels": torch.tensor([1])}
    optimizer, losses = torch.optim.AdamW(detector.parameters(), 2e-3), []
    for _ in range(60):
        loss = sum(detector([image] * 2, [target] * 2).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    used = [p for name, p in detector.backbone.body.named_parameters() if p.grad is not None]
    assert len(used) >= len(list(detector.backbone.body.parameters())) - 2  # a ViT's pooling norm sees no loss
    found = detector.eval()([image])[0]
    assert found["labels"][0] == 1
    assert box_iou(found["boxes"][:1], target["boxes"]).item() > 0.5


def boxes() -> list[dict[str, torch.Tensor]]:
    return [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2


SMALL = {
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 1,
    "num_queries": 10,
    "num_labels": 1,
}


def test_rt_detr_takes_our_configuration(tmp_path) -> None:
    pytest.importorskip("scipy")
    backbone = SSLResNetConfig(**SLIM, out_features=STAGES[1:])
    torch.manual_seed(0)
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=4,
        hidden_expansion=1.0,
        **SMALL,
    )
    detector = RTDetrForObjectDetection(config)
    source = SSLResNetModel(SSLResNetConfig(**SLIM))
    source.save_pretrained(tmp_path / "encoder")
    pretrained = SSLResNetBackbone.from_pretrained(tmp_path / "encoder", out_features=STAGES[1:])
    detector.model.backbone.model.load_state_dict(pretrained.state_dict())  # how an encoder gets into a detector
    images = torch.randn(2, 3, 96, 96)
    detector.train()(pixel_values=images, labels=boxes()).loss.backward()
    weights = {name: p for name, p in detector.named_parameters() if "timm_model" in name and p.ndim > 1}
    assert len(weights) == 21 and all(p.grad.abs().sum() > 0 for p in weights.values())
    first = "model.backbone.model.encoder.timm_model.conv1.weight"
    assert torch.equal(weights[first], source.timm_model.conv1.weight)
    detector.save_pretrained(tmp_path / "detector")
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "detector").eval()
    assert isinstance(again.config.backbone_config, SSLResNetConfig)
    assert torch.equal(again(pixel_values=images).logits, detector.eval()(pixel_values=images).logits)


def test_detr_freezes_our_resnet_until_told_otherwise() -> None:
    """DETR freezes what its own names of stages do not match, in any backbone whose type says resnet."""
    pytest.importorskip("scipy")
    backbone = SSLResNetConfig(**SLIM, out_features=["stage4"])
    detector = DetrForObjectDetection(DetrConfig(backbone_config=backbone, encoder_layers=1, **SMALL)).train()
    body = detector.model.backbone
    assert not any(p.requires_grad for p in body.parameters())
    body.requires_grad_(True)
    detector(pixel_values=torch.randn(2, 3, 96, 96), labels=boxes()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in body.parameters() if p.ndim > 1)


def c4() -> tuple[SSLResNetModel, FasterRCNN]:
    """An encoder, and the detector on a copy of it."""
    torch.manual_seed(0)
    encoder = SSLResNetModel(SSLResNetConfig(**SLIM))
    return encoder, build_c4_detector(copy.deepcopy(encoder), 2, min_size=96, max_size=96)


def test_c4_has_every_weight_of_the_encoder() -> None:
    """Three stages before the proposals and the fourth in the head, and together they are the encoder."""
    encoder, detector = c4()
    head = detector.roi_heads.box_head
    own = {**detector.backbone.state_dict(), **{f"layer4.{k}": v for k, v in head.layer4.state_dict().items()}}
    expected = encoder.timm_model.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    images = torch.randn(2, 3, 96, 96)
    states = encoder.eval()(images, output_hidden_states=True)
    stage3 = detector.eval().backbone(images)
    assert stage3.shape == (2, 32, 6, 6) and torch.equal(stage3, states.hidden_states[3])
    pooled = head.pool(head.layer4(stage3)).flatten(1)
    torch.testing.assert_close(pooled, states.pooler_output)
    torch.testing.assert_close(head(stage3), pooled / (1 + head.norm.eps) ** 0.5)  # a fresh batch norm


def test_c4_pools_without_an_offset() -> None:
    """On a map whose value is its column, a box of 14 columns gives these columns."""
    columns = torch.arange(20.0).expand(1, 1, 20, 20).contiguous()
    boxes = torch.tensor([[2 * 16.0, 0, 16 * 16, 14 * 16]])
    pooled = c4()[1].roi_heads.box_roi_pool({"0": columns}, [boxes], [(320, 320)])
    torch.testing.assert_close(pooled, torch.arange(2.0, 16.0).expand(1, 1, 14, 14))


def test_c4_learns_a_square() -> None:
    """One image, one box: all weights get a gradient, and with the batch norms measured the box is found."""
    torch.manual_seed(0)
    encoder = SSLResNetModel(SSLResNetConfig(**SLIM))
    few = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_test": 50}
    detector = build_c4_detector(encoder, 2, min_size=96, max_size=96, **few)
    image = torch.full((3, 96, 96), 0.2)
    image[:, 16:48, 32:64] = 0.9
    target = {"boxes": torch.tensor([[32.0, 16.0, 64.0, 48.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    for _ in range(32):
        optimizer.zero_grad()
        sum(detector([image] * 2, [target] * 2).values()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in detector.parameters())
    update_batch_norm(detector, [([image] * 2, [target] * 2)] * 2)
    found = detector.eval()([image])[0]
    assert found["labels"][0] == 1
    assert box_iou(found["boxes"][:1], target["boxes"]).item() > 0.5


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: SSLViTModel(SSLViTConfig(architecture="vit_tiny", image_size=64, model_args={"depth": 1})),
        lambda: SSLResNetModel(SSLResNetConfig(**SLIM, stem="small")),
        lambda: SSLResNetModel(SSLResNetConfig(architecture="wide_resnet28_2")),
    ],
)
def test_c4_refuses_what_has_no_such_stages(encoder) -> None:
    with pytest.raises(InputError, match=r"head c4: takes a ResNet .* standard stem"):
        build_c4_detector(encoder(), 2)


class Normalized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, images: list[torch.Tensor], targets: list) -> torch.Tensor:
        return self.norm(torch.stack(images))


def test_batch_norms_hold_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    model, data = Normalized(), torch.randn(4, 2, 3, 5, 5) + 3
    model(list(data[0]), [])  # what was there before does not count
    update_batch_norm(model, ((list(images), []) for images in data))
    torch.testing.assert_close(model.norm.running_mean, data.mean((0, 1, 3, 4)))
    torch.testing.assert_close(model.norm.running_var, data.var((1, 3, 4)).mean(0))
    assert model.norm.momentum == 0.1


def test_voc_counts_from_one(tmp_path: Path) -> None:
    """From pixel 33 to pixel 64, both included, is 32 wide; parts of an object are no objects."""
    path = tmp_path / "a.xml"
    write_annotation(path, [SQUARE, ("person", 1, (1, 1, 1, 96))])
    boxes = [[32.0, 16.0, 32.0, 32.0], [0.0, 0.0, 1.0, 96.0]]
    categories = [VOC_CLASSES.index("dog"), VOC_CLASSES.index("person")]
    assert read_voc_objects(path) == {"bbox": boxes, "category": categories, "difficult": [False, True]}


def test_voc_trains_on_both_years(tmp_path: Path) -> None:
    first = write_voc(tmp_path / "VOCdevkit", trainval=["000001", "000002"], test=["000003"])
    train, test = load_voc(tmp_path)
    assert (len(train), len(test)) == (2, 1)
    write_voc(tmp_path / "VOCdevkit", "2012", trainval=["2008_000001"])
    train, test = load_voc(tmp_path / "VOCdevkit")
    assert [path.stem for path in train.images] == ["000001", "000002", "2008_000001"]
    assert test.images == [first / "JPEGImages" / "000003.jpg"]
    item = train[2]
    assert item["image"].size == (96, 96) and item["image"].getpixel((48, 32))[0] > 200
    assert item["objects"] == {"bbox": [[32.0, 16.0, 32.0, 32.0]], "category": [11], "difficult": [False]}


def test_voc_names_what_is_wrong(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, trainval=["000001"])
    annotation = folder / "Annotations" / "000001.xml"

    def refusal(call=lambda: VOCDetection([(folder, "trainval")])) -> str:
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "test.txt: missing" in refusal(lambda: load_voc(tmp_path))
    assert "JPEGImages: no such folder" in refusal(lambda: load_voc(tmp_path / "elsewhere"))
    write_annotation(annotation, [("dgo", 0, (1, 1, 2, 2))])
    assert "000001.xml: unknown class 'dgo': did you mean 'dog'?" in refusal()
    write_annotation(annotation, [("dog", 0, (5, 1, 4, 2))])
    assert "the box of a dog is empty" in refusal()
    write_annotation(annotation, [("dog", 0, ("left", 1, 4, 2))])
    assert "a dog without the four numbers" in refusal()
    annotation.write_text("<svg/>")
    assert "its root is <svg>" in refusal()
    outside = f'<!DOCTYPE a [<!ENTITY x SYSTEM "{(folder / "secret").as_uri()}">]><annotation>&x;</annotation>'
    annotation.write_text(outside)
    assert "undefined entity" in refusal()
    annotation.unlink()
    assert "000001.xml: cannot be read" in refusal()
    (folder / "JPEGImages" / "000001.jpg").unlink()
    assert "000001.jpg: missing" in refusal()
