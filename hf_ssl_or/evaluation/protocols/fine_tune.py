"""Fine-tuning of the full encoder with `transformers.Trainer`: how well its weights serve as a start.

Every image is augmented anew in each epoch, a batch at a time, by the package's own views. The accuracy is that of the
last epoch, never the best.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.distributed import mean_over_ranks, use_global_batch_norm
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.features import encode, evaluating
from hf_ssl_or.evaluation.protocols.base import Protocol, accuracies, best_classes, check_labeled, labeled
from hf_ssl_or.launcher import refuse_launcher_settings
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor, preprocessing_of
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.orthogonality import OrthogonalityCallback
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import ViewSpec


def _crop_and_flip() -> ViewSpec:
    return ViewSpec(crop_scale=(0.25, 1.0), jitter=0, grayscale=0)


@settings
class FineTuneArguments:
    """How an encoder and a new linear head are trained: AdamW with a linear warm-up and a cosine decay.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step over all processes.
        learning_rate: Peak learning rate, that of the head.
        layer_decay: The learning rate falls by this factor from each layer to the one below it (Bao et al., "BEiT",
            ICLR 2022); 1 trains all layers alike. Layers are timm's: residual or transformer blocks, and the stem; an
            encoder without a timm net has none.
        weight_decay: Of weights; biases, norms and position embeddings have none.
        warmup: Share of the steps in which the learning rate rises.
        label_smoothing: Share of the target spread over all classes.
        max_grad_norm: Clips the gradient to this norm.
        view: How training images are augmented; test images are clean.
        orthogonality: Also keeps the encoder's weights near orthogonal; None does not.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    layer_decay: float | int = 1.0
    weight_decay: float | int = 0.05
    warmup: float | int = 0.1
    label_smoothing: float | int = 0.1
    max_grad_norm: float | int = 1.0
    view: ViewSpec = field(default_factory=_crop_and_flip)
    orthogonality: OrthogonalityConfig | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"fine_tune.{name}: at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "layer_decay", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise InputError(f"fine_tune.{name}: more than 0, not {getattr(self, name)}")
        if self.layer_decay > 1:
            raise InputError(f"fine_tune.layer_decay: at most 1, not {self.layer_decay}")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"fine_tune.{name}: a share from 0 to less than 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FineTuneProtocol(Protocol):
    """Settings of `fine_tune`, which evaluates encoders on images where others evaluate features."""

    arguments: FineTuneArguments = field(default_factory=FineTuneArguments)

    def run_on_images(self, encoder: nn.Module, train: ImageSet, test: ImageSet, **options: Any) -> dict[str, float]:
        """Fine-tunes a copy of the encoder, see `fine_tune` for the options."""
        return fine_tune(encoder, train, test, self.arguments, **options)


FINE_TUNE_PROTOCOLS = (
    FineTuneProtocol(name="fine-tune"),
    FineTuneProtocol(name="fine-tune-layer-decay", arguments=FineTuneArguments(layer_decay=0.75)),  # usual for ViTs
)


def fine_tune(
    encoder: nn.Module | str | os.PathLike[str],
    train: ImageSet,
    test: ImageSet,
    arguments: FineTuneArguments | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    save_to: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Trains a copy of an encoder and a new head on labeled images, and evaluates them on others.

    On several processes each takes its share of every batch, batch statistics are those of the full batch, and every
    process returns the same metrics.

    Args:
        encoder: Its output has `pooler_output` (B, F); it stays as it is. Or the folder or Hub id of a transformers
            model, whose image processor then says what becomes of the images; a head that it has is not used.
        train: Labeled images to train on.
        test: Labeled images to evaluate on.
        arguments: Settings; None takes those of the protocol "fine-tune".
        seed: Key of the head's initial weights, the order and the augmentations.
        device: "cpu" keeps Trainer from the GPU that it would take.
        mixed_precision: Autocast of the model.
        save_to: Folder for the fine-tuned model with its image processor, ready for pipelines; of encoders of this
            package only.
        progress: Shows Trainer's bar.

    Returns:
        `top1` and `top5` on the test images in percent, and `train_loss`, the mean over all steps.

    Raises:
        InputError: Labels are missing or of one class; the encoder cannot be loaded, or returns no features; the batch
            cannot be shared out; the environment has settings of accelerate that would change the training.
    """
    arguments = arguments or FineTuneArguments()
    device = torch.device(device)
    # Trainer's accelerator reads the environment, but for these two, which it is told.
    refuse_launcher_settings(device=device.type, mixed_precision=None, accumulation_steps=None)
    names = _class_names(train, test)
    if not isinstance(encoder, nn.Module):
        encoder, preprocessing = _load(encoder)
        train = train.with_preprocessing(preprocessing)
    if save_to is not None and not isinstance(encoder, SSLModel):
        raise InputError(f"fine_tune: save_to: a {type(encoder).__name__} has no classifier that could be saved")
    test = test.with_preprocessing(train.preprocessing)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        how = _trainer_arguments(arguments, folder, len(train), seed, device, mixed_precision, progress)
        model: Any = _classifier(encoder, names, seed, test)
        model.to(how.device)
        if how.world_size > 1:
            use_global_batch_norm(model)
        groups = parameter_groups(model, arguments.learning_rate, arguments.weight_decay, arguments.layer_decay)
        views = _Views(train, how.device, arguments.view, seed=seed)
        extra = [OrthogonalityCallback(arguments.orthogonality)] if arguments.orthogonality else []
        trainer = Trainer(
            model,
            how,
            train_dataset=views,
            eval_dataset=_Views(test, how.device, None, seed=seed),
            compute_metrics=_accuracies,
            optimizers=(torch.optim.AdamW(groups), None),
            callbacks=[_Epochs(views), *extra],
        )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        trained = trainer.train()
        loss = float(mean_over_ranks(torch.tensor(trained.training_loss, device=how.device)))
        if not math.isfinite(loss):
            raise InputError(f"fine_tune: the training diverged; lower learning_rate, {arguments.learning_rate:g} now")
        how.dataloader_drop_last = False  # every test image counts
        metrics = trainer.evaluate()
    if save_to is not None and how.process_index == 0:
        model.save_pretrained(save_to)
        build_image_processor(train.preprocessing).save_pretrained(save_to)
    return {"top1": metrics["eval_top1"], "top5": metrics["eval_top5"], "train_loss": loss}


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Sorts parameters for an optimizer: one group per layer and kind.

    Args:
        model: A classifier. Its layers are numbered by timm, where it holds a timm net: stem 0, blocks 1 to L, head
            L + 1.
        learning_rate: That of the head; layer l has learning_rate * layer_decay^(L + 1 - l).
        weight_decay: Of weights; none for vectors (biases, norms), for what timm's net exempts (position embeddings)
            and, in another net, for parameters that are no layer's weight.
        layer_decay: At most 1.

    Raises:
        InputError: There is a layer decay, but no timm net.
    """
    timm_nets = (pair for pair in model.named_modules() if hasattr(pair[1], "group_matcher"))
    path, net = next(timm_nets, ("", cast(Any, None)))
    if net is None and layer_decay != 1:
        raise InputError("fine_tune.layer_decay: only timm's nets have numbered layers; leave it 1")
    layer_of = {} if net is None else group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    head = 1 + max(layer_of.values(), default=0)
    exempt = net.no_weight_decay() if hasattr(net, "no_weight_decay") else set()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for full_name, parameter in model.named_parameters():
        name = full_name.removeprefix(f"{path}.")
        is_weight = parameter.ndim > 1 and (net is not None or name.endswith("weight"))
        layer, decays = layer_of.get(name, head), is_weight and name not in exempt
        group = {
            "params": [],
            "lr": learning_rate * layer_decay ** (head - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


class _Views(Dataset):
    """Images and labels of a split, rendered a batch at a time on the device; without a spec, clean."""

    def __init__(self, images: ImageSet, device: torch.device, spec: ViewSpec | None, *, seed: int) -> None:
        self.images, self.device, self.spec, self.seed, self.epoch = images, device, spec, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        assert self.images.labels is not None, "fine_tune has checked them"
        index_B = np.array(indices)
        if self.spec is None:
            (x_BCHW,) = self.images.clean([index_B], self.device)
        else:
            group = ViewGroup(
                specs=self.images.suited([self.spec]),
                size=self.images.image_size,
                seed=hashed_seed("fine-tune", self.seed),
                epoch=self.epoch,
            )
            (((x_1BCHW,), index_B),) = self.images.views([ViewPlan(index_B, (group,))], self.device)
            x_BCHW = x_1BCHW[0]
        labels_B = self.images.labels[torch.from_numpy(index_B)].to(self.device)
        return [{"pixel_values": x, "labels": y} for x, y in zip(x_BCHW, labels_B, strict=True)]


class _Epochs(TrainerCallback):
    """Tells the views which epoch it is, so that each augments anew."""

    def __init__(self, views: _Views) -> None:
        self.views = views

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.views.epoch = round(state.epoch or 0)


def _class_names(train: ImageSet, test: ImageSet) -> list[str]:
    """Checks the labels of both splits and names the classes, by their numbers where the data has no names."""
    rows = (labeled(torch.arange(float(len(x)))[:, None], x.labels, what="fine-tune") for x in (train, test))
    classes = check_labeled(*rows, what="fine-tune")  # of rows in place of features
    named = train.class_names or []
    return named if len(named) >= classes else [str(k) for k in range(classes)]


def _load(source: str | os.PathLike[str]) -> tuple[PreTrainedModel, Preprocessing]:
    """Loads an encoder, without the head that it may have, and what its image processor does."""
    name = os.fspath(source)
    try:
        return AutoModel.from_pretrained(name), preprocessing_of(AutoImageProcessor.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be loaded as an encoder: {' '.join(str(error).split())[:300]}") from error


class _Classifier(nn.Module):
    """A copy of any encoder under a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.config = PreTrainedConfig()  # Trainer asks for it
        self.encoder, self.classifier = copy.deepcopy(encoder), nn.Linear(width, classes)
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits_BK = self.classifier(self.encoder(pixel_values).pooler_output)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits_BK, labels)}
        return {**loss, "logits": logits_BK}


def _classifier(encoder: nn.Module, names: list[str], seed: int, images: ImageSet) -> nn.Module:
    """Copies an encoder under a new head, whose weights come from the seed."""
    model: Any
    if isinstance(encoder, SSLModel):
        config = copy.deepcopy(encoder.config)
        config.update({"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}})
        model = AutoModelForImageClassification.from_config(config)
        model.base_model.load_state_dict(encoder.state_dict())
    else:
        model = _Classifier(encoder, _width(encoder, images), len(names))
        nn.init.zeros_(model.classifier.bias)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(seed, "fine-tune"))
        nn.init.trunc_normal_(model.classifier.weight, std=0.02)
    return model


def _width(encoder: nn.Module, images: ImageSet) -> int:
    """Returns the size of an encoder's features, seen on one image."""
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    (x_1CHW,) = images.clean([np.array([0])], device)
    with evaluating(encoder), torch.no_grad():
        return encode(encoder, x_1CHW).shape[1]


def _trainer_arguments(
    arguments: FineTuneArguments,
    folder: str,
    images: int,
    seed: int,
    device: torch.device,
    mixed_precision: str,
    progress: bool,
) -> TrainingArguments:
    how = TrainingArguments(
        output_dir=folder,
        num_train_epochs=arguments.epochs,
        dataloader_drop_last=True,  # a last small batch would depend on the number of processes
        lr_scheduler_type="cosine",
        warmup_steps=arguments.warmup,  # below 1 it is a share
        label_smoothing_factor=arguments.label_smoothing,
        max_grad_norm=arguments.max_grad_norm,
        fp16=mixed_precision == "fp16",
        bf16=mixed_precision == "bf16",
        use_cpu=device.type == "cpu",
        seed=hashed_seed("trainer", seed) % 2**32,
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are made on the device
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not progress,
    )
    how.mixed_precision = mixed_precision  # without fp16 and bf16 that of the environment
    how._n_gpu = min(how.n_gpu, 1)  # a process has one device: no DataParallel, whose batch statistics are partial
    batch, processes = min(arguments.batch_size, images), how.world_size
    if batch % processes:
        raise InputError(f"fine_tune.batch_size: {batch} images cannot be shared out to {processes} processes")
    how.per_device_train_batch_size = how.per_device_eval_batch_size = batch // processes
    return how


def _accuracies(prediction: EvalPrediction) -> dict[str, float]:
    predicted_NT = best_classes(torch.from_numpy(prediction.predictions))
    found = accuracies(predicted_NT, torch.from_numpy(prediction.label_ids))
    return {f"top{top}": percent for top, percent in found.items()}
