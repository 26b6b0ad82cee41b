"""MAE (He et al., CVPR 2022): from a quarter of an image's patches, the pixels of the others are predicted.

The encoder, a vision transformer, sees the kept patches alone. A small decoder gets its tokens, and for each masked
patch one learned token, all with their positions. With y the decoder's output, x the pixels of a patch, M the masked
patches of an image:

    loss = mean over images and patches p of M of mean_i (y_pi - t_pi)^2,   t_p = (x_p - mean x_p) / std x_p

V views are images like any others, each with a mask of its own: the mean over views, with V = 1 as published.

Attention does not care for the order of tokens, so the decoder takes them as kept, then masked: nothing is put back in
place, and only what the loss reads is predicted. The encoder keeps its own (learned) positions and initialization; the
decoder has the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import SSLMethod, require_positive
from hf_ssl_or.methods.decoder import Decoder, sine_cosine_positions
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel
from hf_ssl_or.randomness import keyed_orders
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class MAEConfig:
    """Settings of MAE.

    Attributes:
        mask_ratio: Share of the patches that the encoder does not see.
        normalize_targets: Predict each patch's pixels with zero mean and unit variance instead of as they are.
        decoder_width: Width of the decoder.
        decoder_depth: Number of its transformer blocks.
        decoder_heads: Number of heads of each.
    """

    mask_ratio: float | int = 0.75  # the paper; solo-learn, CIFAR
    normalize_targets: bool = True  # the paper's best; solo-learn, CIFAR
    decoder_width: int = 512  # the paper; solo-learn, CIFAR
    decoder_depth: int = 8  # the paper; solo-learn, CIFAR
    decoder_heads: int = 16  # the authors' code; solo-learn, CIFAR

    def validate_ranges(self) -> None:
        """Checks that the ratio is a share and that heads and positions divide the decoder's width."""
        require_positive(self, "decoder_width", "decoder_depth", "decoder_heads")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: lies between 0 and 1, not {self.mask_ratio}")
        for divisor, what in ((4, "4"), (self.decoder_heads, f"decoder_heads, {self.decoder_heads}")):
            if self.decoder_width % divisor:
                raise ValueError(f"decoder_width: must be a multiple of {what}, not {self.decoder_width}")


@full_precision
def mae_loss(predictions_MLP: Tensor, patches_MLP: Tensor, normalize: bool = True) -> Tensor:
    """Returns the mean squared error of masked patches; a mean over images, so shards can be averaged.

    Args:
        predictions_MLP: The decoder's, for L masked patches of P values of each of M images.
        patches_MLP: What they are to be, see `patchify`.
        normalize: Compare with each patch's values at zero mean and unit (unbiased) variance.
    """
    if normalize:
        var, mean = torch.var_mean(patches_MLP, dim=-1, keepdim=True)
        patches_MLP = (patches_MLP - mean) * (var + 1e-6).rsqrt()
    return (predictions_MLP - patches_MLP).square().mean()


def patchify(images: Tensor, size: int) -> Tensor:
    """Cuts images (M, C, H, W) into patches (M, H/size * W/size, size * size * C), row by row."""
    rows_columns = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return rows_columns.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def number_kept(patches: int, mask_ratio: float) -> int:
    """Returns how many of an image's patches are kept, rounded down as in the authors' code.

    Raises:
        InputError: None would be kept, or none masked.
    """
    kept = int(patches * (1 - mask_ratio) + 1e-6)  # 10 * (1 - 0.9) is a hair less than 1
    if not 0 < kept < patches:
        raise InputError(f"method.mask_ratio: {mask_ratio} keeps {kept} of {patches} patches; make patches smaller")
    return kept


class MAE(SSLMethod):
    """MAE for any number of views.

    Example:
        method = MAE(create_encoder("vit_tiny", image_size=32, patch_size=4), mask_ratio=0.75)
        method(batch).loss.backward()
    """

    config_class = MAEConfig
    min_views = 1
    needs_patches = True
    order_of_views_matters = True  # each view's mask is sampled for its number
    views = (ViewSpec(jitter=0.0, grayscale=0.0),)  # the paper; solo-learn, CIFAR: crops from 0.08
    citation = """@inproceedings{he2022masked,
  title = {Masked Autoencoders Are Scalable Vision Learners},
  author = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}
}"""

    encoder: SSLViTModel

    def build_heads(self) -> None:
        """Builds the decoder.

        Raises:
            InputError: The ratio keeps or masks no patch, or the encoder drops patches itself.
        """
        config, net, shape = self.config, self.encoder.timm_model, self.encoder.config
        number_kept(net.patch_embed.num_patches, config.mask_ratio)
        if not isinstance(net.patch_drop, nn.Identity):
            raise InputError("encoder.model_args: mae chooses the patches itself; leave patch_drop_rate at 0")
        self.decoder = Decoder(
            self.feature_size,
            config.decoder_width,
            shape.patch_size**2 * shape.num_channels,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
        )

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Predicts the masked patches of every view."""
        views_VBCHW, config, size = batch.views_VBCHW, self.config, self.encoder.config.patch_size
        images = views_VBCHW.flatten(0, 1)
        rows, columns = images.shape[2] // size, images.shape[3] // size
        order_VBP = keyed_orders(batch.index_B, len(views_VBCHW), rows * columns, batch.seed, batch.step, "mask")
        kept = number_kept(rows * columns, config.mask_ratio)
        kept_MK, masked_ML = order_VBP.flatten(0, 1).tensor_split([kept], dim=1)
        tokens_MTF = self.encode_images(images, read="last_hidden_state", kept_patches=kept_MK)
        tokens_MTF = self.encoder.timm_model.fc_norm(tokens_MTF)  # with average pooling the encoder's last norm
        positions_PD = sine_cosine_positions(rows, columns, config.decoder_width, images.device)
        predictions_MLS = self.decode(tokens_MTF, kept_MK, masked_ML, positions_PD)
        targets_MLS = torch.take_along_dim(patchify(images, size), masked_ML[..., None], dim=1)
        loss = global_mean(mae_loss(predictions_MLS, targets_MLS, config.normalize_targets))
        features_VBF = tokens_MTF.mean(1).unflatten(0, views_VBCHW.shape[:2])
        return self.output(loss, {"reconstruction": loss}, features_VBF)

    def decode(self, tokens_MTF: Tensor, kept_MK: Tensor, masked_ML: Tensor, positions_PD: Tensor) -> Tensor:
        """Runs the decoder, which is often larger than the encoder, in as many parts as `encode_images`."""
        inputs = tokens_MTF, kept_MK, masked_ML
        if self.chunks == 1:
            return self.decoder(*inputs, positions_PD)
        parts = zip(*(tensor.chunk(self.chunks) for tensor in inputs), strict=True)
        return torch.cat([checkpoint(self.decoder, *part, positions_PD, use_reentrant=False) for part in parts])
