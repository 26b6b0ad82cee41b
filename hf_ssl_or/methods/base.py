"""What every method shares: its contract, the one encoder forward over all views, and gradient accumulation.

A method is one file with a docstring, a `Config`, a pure loss function of embeddings and a class `Method(SSLMethod)`.
It owns its heads and its state (teacher, queue, centre); the training loop knows nothing of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ssl_or.distributed import has_batch_statistics
from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.teacher import MomentumTeacher
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


class SSLMethod(nn.Module):
    """A self-supervised method: encoder, heads and loss.

    A subclass sets the class attributes, builds its heads after `super().__init__` and defines `forward`. The class
    attributes are checked when the class is defined; `class Shared(SSLMethod, abstract=True)` is not checked.

    Args:
        encoder: Gives `encoder(pixel_values=images).pooler_output` of shape (images, F); `encoder.config.hidden_size`
            is F. A transformers model, or anything that looks like it.
        config: An instance of `config_class`.
        num_views: V, the number of views of each image.
        batch_size: N, the number of images in the global batch, of all processes together.
        num_local_views: Number of smaller views, for methods with multi-crop.

    Attributes:
        config_class: Strict dataclass of the method's settings.
        views: Default augmentation of each view, repeated in turn when there are more views.
        citation: BibTeX entry of the paper.
        min_views: Smallest number of views that the method works with.
        takes_local_views: Whether the method makes use of local views.
        chunks: In how many parts the encoder sees the batch, see `prepare_accumulation`.

    Raises:
        InputError: The method cannot work with so many views or so small a batch.
    """

    config_class: ClassVar[type]
    views: ClassVar[tuple[ViewSpec, ...]]
    citation: ClassVar[str]
    min_views: ClassVar[int] = 2
    takes_local_views: ClassVar[bool] = False

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in ("config_class", "views", "citation") if getattr(cls, name, None) is None]
        if missing and not abstract:
            raise TypeError(f"{cls.__module__}.{cls.__qualname__} must define {', '.join(missing)}")

    def __init__(
        self, encoder: nn.Module, config: Any, *, num_views: int, batch_size: int, num_local_views: int = 0
    ) -> None:
        super().__init__()
        name = type(self).__module__.rpartition(".")[2]
        if num_views < self.min_views:
            raise InputError(f"views.count: {name} needs at least {self.min_views} views, not {num_views}")
        if num_local_views and not self.takes_local_views:
            raise InputError(f"views.local_count: {name} takes no local views; set it to 0, not {num_local_views}")
        if batch_size < 2:
            raise InputError(f"training.batch_size: {name} needs at least 2 images, not {batch_size}")
        self.encoder, self.config = encoder, config
        self.num_views, self.num_local_views, self.batch_size = num_views, num_local_views, batch_size
        self.feature_size: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        self.chunks, self.channels_last = 1, False

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Gives the loss of the global batch, from this process's part of it."""
        raise NotImplementedError

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Is called after each optimizer step (0 <= step < total_steps); moves teachers, schedules and the like."""

    def encode(self, views_VBCHW: Tensor, encoder: nn.Module | None = None) -> Tensor:
        """Encodes all views in one forward of V*B images, view by view in order.

        Args:
            views_VBCHW: Images; all views have one size.
            encoder: Another encoder than the trained one, say a teacher's.

        Returns:
            Features, (V, B, F).
        """
        encoder = self.encoder if encoder is None else encoder
        images = views_VBCHW.flatten(0, 1)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.chunks == 1:
            features = _features(encoder, images)
        else:
            parts = images.chunk(self.chunks)
            features = torch.cat([_recomputed_features(encoder, part) for part in parts])
        return features.unflatten(0, views_VBCHW.shape[:2])

    def output(self, loss: Tensor, terms: dict[str, Tensor], features_VBF: Tensor) -> SSLOutput:
        """Packs the loss with its terms and features, both detached."""
        terms = {name: term.detach() for name, term in terms.items()}
        return SSLOutput(loss=loss, terms=terms, features_VBF=features_VBF.detach())

    def prepare_accumulation(self, chunks: int) -> None:
        """Makes a step need about 1/chunks of the encoder's memory, with the gradient of the whole batch.

        The loss compares all images with each other, so summing gradients over small batches would be another loss.
        Instead activations are recomputed in backward: of one chunk of images at a time, or, for an encoder whose
        output for an image depends on the other images (batch normalisation), of one block at a time.
        """
        if chunks > 1 and has_batch_statistics(self.encoder):
            self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        else:
            self.chunks = chunks

    def use_channels_last(self) -> None:
        """Stores convolution weights and images with channels last, which tensor cores prefer."""
        self.to(memory_format=torch.channels_last)
        self.channels_last = True

    def encoders(self) -> list[nn.Module]:
        """Gives the trained encoder and its momentum copies, say to compile each of them."""
        owners = [module for module in self.modules() if isinstance(module, SSLMethod | MomentumTeacher)]
        return [owner.encoder for owner in owners]


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError, naming the field, unless all these fields of `config` are above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}: must be above 0, not {getattr(config, name)}")


def _features(encoder: nn.Module, images: Tensor) -> Tensor:
    return encoder(pixel_values=images).pooler_output


def _recomputed_features(encoder: nn.Module, images: Tensor) -> Tensor:
    return checkpoint(_features, encoder, images, use_reentrant=False)
