"""What every method shares: its contract, the one encoder forward over all views, and its chunks.

A method is one file with a docstring, a dataclass of settings, a pure loss function of embeddings and one subclass of
`SSLMethod`. It owns its heads and its state (teacher, queue, center); the training loop knows nothing of them.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ssl_or.distributed import gather_batch, images_together, keep_statistics, world_size
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.methods.teacher import MomentumTeacher
from hf_ssl_or.methods.whitening import WhiteningConfig, feature_whitening
from hf_ssl_or.models.adapters import adapt_encoder
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


class SSLMethod(nn.Module):
    """A self-supervised method: encoder, heads and loss.

    A subclass sets the class attributes and defines `build_heads` and `forward`. The class attributes are checked when
    the class is defined; `class Shared(SSLMethod, abstract=True)` is not checked.

    Args:
        encoder: The encoder that is trained: one of ours, of transformers, of timm, or any module that maps images to
            features, see `adapt_encoder`.
        config: An instance of `config_class`, in place of `settings`.
        whitening: Variance and covariance terms that are added to the loss; None for none.
        settings: Fields of `config_class`; those left out have the defaults given there.

    Attributes:
        config_class: Strict dataclass of the method's settings.
        views: Default augmentation of each view, repeated in turn when there are more views.
        citation: BibTeX entry of the paper.
        min_views: Smallest number of views that the method works with.
        takes_local_views: Whether the method makes use of local views.
        needs_patches: Whether the encoder must be a vision transformer of ours.
        order_of_views_matters: Whether the loss changes when the views change places.
        name: The name that `get_method` knows, which is that of the file.
        feature_size: F, the width of the encoder's features.
        chunks: In how many parts the encoder sees the batch, see `prepare_chunks`.
        images_together: A part is made of so many images, or of several times as many.

    Raises:
        InputError: A setting is unknown or wrong, or the method cannot train such an encoder.
    """

    config_class: ClassVar[type]
    views: ClassVar[tuple[ViewSpec, ...]]
    citation: ClassVar[str]
    min_views: ClassVar[int] = 2
    takes_local_views: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    order_of_views_matters: ClassVar[bool] = False
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [name for name in ("config_class", "views", "citation") if getattr(cls, name, None) is None]
        if missing and not abstract:
            raise TypeError(f"{cls.__module__}.{cls.__qualname__} must define {', '.join(missing)}")
        if not missing:
            cls.__signature__ = _signature(cls.config_class)

    def __init__(
        self,
        encoder: nn.Module,
        config: Any = None,
        *,
        whitening: WhiteningConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        module = type(self).__module__.rpartition(".")[2]
        self.name = type(self).__name__ if module == "__main__" else module
        self.config, self.whitening = self._configured(config, settings), whitening
        if not isinstance(encoder, nn.Module):
            raise InputError(f"encoder: a module is wanted, which create_encoder makes of a name, not {encoder!r:.80}")
        if self.needs_patches and not isinstance(encoder, SSLViTModel):
            raise InputError(f"encoder.name: {self.name} needs a vision transformer of create_encoder, say vit_tiny")
        try:
            self.encoder = adapt_encoder(encoder)
        except ValueError as error:
            raise InputError(f"encoder: {str(error).removeprefix('encoder: ')}") from error
        self.num_views, self.num_local_views = 0, 0  # not known yet
        self.feature_size: int = self.encoder.config.hidden_size
        self.chunks, self.images_together, self.channels_last = 1, 1, False
        self.build_heads()

    @classmethod
    def _configured(cls, config: Any, settings: dict[str, Any]) -> Any:
        kind, name = cls.config_class, cls.__name__
        if config is not None:
            if settings:
                raise InputError(f"{name}: give either config or settings ({', '.join(settings)}), not both")
            if not isinstance(config, kind):
                raise InputError(f"{name}: config must be a {kind.__name__}, not {config!r:.80}")
            return config
        known = [field.name for field in dataclasses.fields(kind)]
        for key in settings:
            if key not in known:
                raise unknown(f"setting of {name}", key, known)
        try:
            return kind(**settings)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise InputError(f"{name}: {' '.join(str(error.__cause__ or error).split())}") from error

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return dataclasses.asdict(self.config)

    def build_heads(self) -> None:
        """Builds heads and state; `encoder`, `config` and `feature_size` are there already."""

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Checks the sizes of the batches to come and builds what depends on them.

        The trainer calls it before training; without it, the first batch says the sizes. Call it before
        `load_state_dict`, as a queue per view is empty until then. Another call with the same sizes changes nothing.

        Args:
            num_views: V, the number of views of each image.
            batch_size: N, the number of images in the global batch, of all processes together.
            num_local_views: Number of smaller views, for methods with multi-crop.

        Raises:
            InputError: The method cannot work with so many views or so small a batch.
        """
        if num_views < self.min_views:
            raise InputError(f"views.count: {self.name} needs at least {self.min_views} views, not {num_views}")
        if num_local_views and not self.takes_local_views:
            raise InputError(
                f"views.local_count: {self.name} takes no local views; set it to 0, not {num_local_views}"
            )
        if batch_size < 2:
            raise InputError(f"training.batch_size: {self.name} needs at least 2 images, not {batch_size}")
        self.num_views, self.num_local_views = num_views, num_local_views

    def __call__(self, batch: MultiViewBatch) -> SSLOutput:
        """Runs `forward`, after `prepare` where the numbers of views are not those that it was called for."""
        num_views, images = batch.views_VBCHW.shape[:2]
        num_local_views = 0 if batch.local_views_VBCHW is None else len(batch.local_views_VBCHW)
        if (num_views, num_local_views) != (self.num_views, self.num_local_views):
            self.prepare(num_views=num_views, batch_size=images * world_size(), num_local_views=num_local_views)
        return super().__call__(batch)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Returns the loss of the global batch, from this process's part of it."""
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
        features = self.encode_images(views_VBCHW.flatten(0, 1), encoder)
        return features.unflatten(0, views_VBCHW.shape[:2])

    def encode_with_local_views(self, batch: MultiViewBatch) -> Tensor:
        """Encodes the views and, in a second forward, the smaller local views: (V + local views, B, F)."""
        features_VBF = self.encode(batch.views_VBCHW)
        if batch.local_views_VBCHW is None:
            return features_VBF
        return torch.cat([features_VBF, self.encode(batch.local_views_VBCHW)])

    def encode_images(
        self, images: Tensor, encoder: nn.Module | None = None, *, read: str = "pooler_output", **inputs: Tensor
    ) -> Tensor:
        """Encodes images (M, C, H, W), in parts that are recomputed in backward where that was asked for.

        Args:
            images: The images.
            encoder: Another encoder than the trained one.
            read: Name of the encoder's output to return, with M as its first dimension.
            inputs: Further inputs of the encoder, with M as their first dimension.
        """
        encoder = self.encoder if encoder is None else encoder
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        tensors = {"pixel_values": images, **inputs}
        if self.chunks == 1:
            return _encoded(encoder, read, tensors)
        units = -(-len(images) // self.images_together)
        size = -(-units // self.chunks) * self.images_together
        parts = zip(*(tensor.split(size) for tensor in tensors.values()), strict=True)
        return torch.cat([_encoded_again(encoder, read, dict(zip(tensors, part, strict=True))) for part in parts])

    def output(self, loss: Tensor, terms: dict[str, Tensor], embeddings_VBD: Tensor) -> SSLOutput:
        """Packs the loss with its terms, detached; adds feature whitening where `whitening` asks for it.

        Args:
            loss: The loss of the global batch.
            terms: Its parts, for the log.
            embeddings_VBD: This process's projections, or predictions where the method has a predictor, with gradient.
        """
        if self.whitening is not None and self.whitening.weight > 0:
            embeddings_VND = gather_batch(embeddings_VBD, dim=1)
            whitening = self.whitening.weight * feature_whitening(embeddings_VND, self.whitening.covariance)
            loss, terms = loss + whitening, {**terms, "whitening": whitening}
        return SSLOutput(loss=loss, terms={name: term.detach() for name, term in terms.items()})

    def prepare_chunks(self, chunks: int, *, recompute_blocks: bool = False) -> None:
        """Makes a step need less of the encoder's memory, with the gradient of the full batch.

        The loss compares all images with each other, so summing gradients over small batches would be another loss.
        Instead activations are recomputed in backward: of one part of the views of all images at a time, for about
        1/chunks of the memory. With batch statistics per view a part is made of complete views. With those of the
        full batch, all images must pass a block before the next one, so activations are recomputed block by block.

        Args:
            chunks: Number of parts.
            recompute_blocks: Recomputes block by block in any case.

        Raises:
            InputError: Blocks must be recomputed, and the encoder has no gradient checkpointing.
        """
        together = images_together(self.encoder)
        if together is not None:
            self.chunks, self.images_together = chunks, together
        if recompute_blocks or (chunks > 1 and together is None):
            try:
                self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            except (AttributeError, ValueError) as error:
                key, off = ("gradient_checkpointing", "false") if recompute_blocks else ("forward_chunks", "1")
                why = "" if recompute_blocks else ", which its batch statistics need here"
                raise InputError(
                    f"training.{key}: this encoder has no gradient checkpointing{why}; leave it at {off}"
                ) from error

    def use_channels_last(self) -> None:
        """Stores convolution weights and images with channels last, which tensor cores prefer."""
        self.to(memory_format=torch.channels_last)
        self.channels_last = True

    def encoders(self) -> list[nn.Module]:
        """Returns the trained encoder and its momentum copies, say to compile each of them."""
        owners = [module for module in self.modules() if isinstance(module, SSLMethod | MomentumTeacher)]
        return [owner.encoder for owner in owners]


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError, naming the field, unless all these fields of `config` are above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}: must be above 0, not {getattr(config, name)}")


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Raises ValueError, naming the field, unless all these fields of `config` are at least `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: must be at least {least}, not {getattr(config, name)}")


def require_share(config: Any, *names: str) -> None:
    """Raises ValueError, naming the field, unless all these fields of `config` lie in [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: lies in [0, 1], not {getattr(config, name)}")


def _signature(config_class: type) -> inspect.Signature:
    """Returns the signature of a method's constructor, with the settings and their defaults."""
    _, encoder, config, whitening, _ = inspect.signature(SSLMethod.__init__, eval_str=True).parameters.values()
    hints, settings = get_type_hints(config_class), inspect.signature(config_class).parameters
    keywords = [
        setting.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, setting in settings.items()
    ]
    return inspect.Signature([encoder, config.replace(annotation=config_class | None), whitening, *keywords])


def _encoded(encoder: nn.Module, read: str, tensors: dict[str, Tensor]) -> Tensor:
    return getattr(encoder(**tensors), read)


def _encoded_again(encoder: nn.Module, read: str, tensors: dict[str, Tensor]) -> Tensor:
    """Encodes now and once more in backward, which leaves running statistics alone."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), keep_statistics(encoder)

    return checkpoint(_encoded, encoder, read, tensors, use_reentrant=False, context_fn=contexts)
