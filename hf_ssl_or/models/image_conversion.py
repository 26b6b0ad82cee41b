"""One way from a file to pixels: any file or object becomes an upright array, then the square that an encoder gets.

Views, probes, the monitor, the image processor (also in a folder of the Hub, which carries this file), pipelines and
exports all come here, so that an image has the same pixels wherever an encoder meets it. PIL resizes in evaluation.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

tifffile: Any = None
pydicom: Any = None
# A folder of the Hub may be used where these are not installed; transformers requires all imports outside of a try.
try:  # noqa: SIM105
    import tifffile
except ImportError:
    pass
try:
    import pydicom
    from pydicom.pixels import apply_rescale, apply_voi_lut, pixel_array
except ImportError:
    pass
try:
    from pillow_heif import register_heif_opener

    register_heif_opener()
except ImportError:
    pass

MAX_CHANNELS = 32
MAX_ASPECT = 100  # of the longer side to the shorter one
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
_NUMPY, _ZIP, _TIFF = b"\x93NUMPY", b"PK\x03\x04", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PIL_TIFF_MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")
_BITS_PER_SAMPLE = 258  # a TIFF tag
_RUNS_PROGRAMS = ("EPS", "WMF")  # formats that Pillow hands to other programs
_INTEGERS: dict[str, tuple[int, int]] = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-32768, 32767)}

ValueRange = tuple[float, float] | Literal["dtype"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Everything between the array of an image and the tensor that the encoder gets.

    Attributes:
        image_size: Side of the square in pixels.
        num_channels: Channels of the tensor.
        crop_pct: Share of the resized shorter side that the square keeps, as in timm: the shorter side is resized to
            `image_size / crop_pct`, and the center is cropped.
        interpolation: Filter of the resize, antialiased: "bilinear", "bicubic", "lanczos" or "nearest".
        eight_bit: Whether pixels are uint8. Other images than the set's own kind are refused: their values mean
            something else.
        value_range: Pixel values that become 0 and 1; what lies outside is clipped. "dtype" takes the range of each
            image's own type: all values of uint8, uint16 and int16, and [0, 1] of float32.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: A value is out of range.
    """

    image_size: int
    num_channels: int = 3
    crop_pct: float = 1.0
    interpolation: Interpolation = "bilinear"
    eight_bit: bool = True
    value_range: ValueRange = (0.0, 255.0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("value_range", "mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, str):  # lists come from JSON
                object.__setattr__(self, name, tuple(float(number) for number in value))
        if self.image_size < 1:
            raise ValueError(f"image_size: at least 1 pixel, not {self.image_size}")
        if not 1 <= self.num_channels <= MAX_CHANNELS:
            raise ValueError(f"num_channels: 1 to {MAX_CHANNELS}, not {self.num_channels}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: more than 0 and at most 1, not {self.crop_pct}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation: {', '.join(_FILTERS)}, not {self.interpolation!r}")
        check_value_range(self.value_range)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.num_channels:
                raise ValueError(
                    f"{name}: {self.num_channels} numbers, one per channel, not {len(getattr(self, name))}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std: positive, not {list(self.std)}")

    @property
    def resize_to(self) -> int:
        """Shorter side before the crop in pixels, rounded as timm does."""
        return math.floor(self.image_size / self.crop_pct)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def square(self, image: Any) -> np.ndarray:
        """Returns the pixels of an image that the encoder sees, before they are scaled: (image_size, image_size, C).

        Args:
            image: What `to_pixels` takes.

        Raises:
            ValueError, OSError: The image cannot be decoded, or is of another kind than the encoder's.
        """
        pixels = of_kind(to_pixels(image, self.num_channels), self.value_range, self.eight_bit)
        return resize_and_crop(pixels, self.resize_to, self.image_size, self.interpolation)

    def tensor(self, image: Any) -> Tensor:
        """Returns what the encoder gets of an image: (C, image_size, image_size) float32, normalized.

        Args:
            image: What `to_pixels` takes, say a path.

        Raises:
            ValueError, OSError: As `square`.
        """
        x_CHW = torch.from_numpy(np.array(self.square(image).transpose(2, 0, 1)))
        return normalize_pixels(scale_pixels(x_CHW, self.value_range), self.mean, self.std)


def of_kind(pixels: np.ndarray, value_range: ValueRange, eight_bit: bool) -> np.ndarray:
    """Refuses 8-bit pixels where others were measured, and others where 8-bit ones were.

    Returns:
        The pixels; with the range "dtype" as uint8, or as float32 in [0, 1], since a resize forgets wider types.

    Raises:
        ValueError: They are of the other kind.
    """
    if value_range == "dtype":
        if pixels.dtype.name in ("uint16", "int16"):
            low, high = dtype_range(pixels.dtype.name)
            return ((pixels.astype(np.float32) - low) / (high - low)).astype(np.float32)
        return pixels
    if (pixels.dtype == np.uint8) != eight_bit:
        ours = "8-bit" if eight_bit else f"wider, with the range {list(value_range)}"
        raise ValueError(
            f"{pixels.dtype} pixels, but those of the set are {ours}: their values mean something else; "
            "convert one kind, or train with data.value_range=dtype"
        )
    return pixels


def check_value_range(value_range: Any) -> None:
    """Checks a range of pixel values.

    Raises:
        ValueError: It is neither "dtype" nor two finite numbers, low < high.
    """
    if value_range == "dtype":
        return
    if len(value_range) != 2 or not all(map(math.isfinite, value_range)) or not value_range[0] < value_range[1]:
        raise ValueError(f"value_range: 'dtype' or two finite numbers, low < high, not {value_range!r}")


def scale_pixels(pixels: Tensor, value_range: ValueRange) -> Tensor:
    """Returns pixels as float32 in [0, 1], clipped where they lie outside of the range.

    Args:
        pixels: Pixels of any shape and of uint8, uint16, int16 or float32.
        value_range: See `Preprocessing`.
    """
    low, high = dtype_range(str(pixels.dtype).removeprefix("torch.")) if value_range == "dtype" else value_range
    x = pixels.to(torch.float32)
    if low:
        x = x - low
    x = x / (high - low)
    return x if pixels.dtype == torch.uint8 and (low, high) == (0, 255) else x.clamp_(0, 1)


def normalize_pixels(x_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns (x - mean) / std per channel of values in [0, 1]: (B, C, H, W)."""
    mean_C11, std_C11 = (torch.tensor(values, device=x_BCHW.device).view(-1, 1, 1) for values in (mean, std))
    return (x_BCHW - mean_C11) / std_C11


def dtype_range(dtype: str) -> tuple[float, float]:
    """Returns the range of all values of an integer type, or [0, 1] of a float type."""
    low, high = _INTEGERS.get(dtype, (0, 1))
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


def resize_and_crop(
    pixels_HWC: np.ndarray, shorter: int, crop: int, interpolation: Interpolation = "bilinear"
) -> np.ndarray:
    """Resizes the shorter side and crops the center, to the pixel as torchvision and timm do: (crop, crop, C).

    Args:
        pixels_HWC: Pixels of an image.
        shorter: Pixels of the shorter side after the resize, at least `crop`.
        crop: Side of the square.
        interpolation: Filter of the resize.
    """
    resized = resize(pixels_HWC, output_size(pixels_HWC.shape[:2], shorter), interpolation)
    top, left = (round((side - crop) / 2.0) for side in resized.shape[:2])
    return np.ascontiguousarray(resized[top : top + crop, left : left + crop])


def output_size(size: Sequence[int], shorter: int) -> tuple[int, int]:
    """Returns height and width with the shorter side at `shorter`, rounded as torchvision does."""
    height, width = size
    longer = int(shorter * max(size) / min(size))
    return (shorter, longer) if height <= width else (longer, shorter)


def resize(pixels_HWC: np.ndarray, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> np.ndarray:
    """Resizes an image, antialiased, by PIL.

    Args:
        pixels_HWC: Pixels of one of our four types.
        size: Height and width of the result.
        interpolation: Filter.

    Returns:
        (*size, C), uint8 for uint8 and float32 for other types; pixels that are left as they were keep their type.
    """
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    shape, resample = (size[1], size[0]), _FILTERS[interpolation]
    if pixels_HWC.dtype == np.uint8 and pixels_HWC.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels_HWC).resize(shape, resample))
    kind = np.uint8 if pixels_HWC.dtype == np.uint8 else np.float32
    planes = (np.ascontiguousarray(plane, dtype=kind) for plane in np.moveaxis(pixels_HWC, -1, 0))
    return np.stack([np.asarray(Image.fromarray(plane).resize(shape, resample)) for plane in planes], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels of an object


def to_pixels(image: Any, num_channels: int = 3, *, least: int | None = None) -> np.ndarray:
    """Converts an image to an upright array with the wanted channels: (H, W, C) of uint8, uint16, int16 or float32.

    Grayscale is repeated where three channels are wanted, colors become grayscale where one is; transparency becomes
    white; other numbers of channels must be the image's own. No value changes otherwise: 16 bits stay 16 bits.

    Args:
        image: A path, encoded bytes, a PIL image in any mode (opened, but not necessarily decoded), or an array or
            tensor (H, W), (H, W, C) or (C, H, W).
        num_channels: Channels of the result.
        least: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps so many pixels.

    Raises:
        ValueError, OSError: The image cannot be decoded, is empty, holds NaN or infinite values, is more than 100
            times as long as wide, or has other channels.
    """
    if isinstance(image, str | os.PathLike | bytes | memoryview):
        image = open_image(image)
    if isinstance(image, Image.Image):
        pixels = _from_pil(image, num_channels, least)
    else:
        pixels = _from_array(image, num_channels)
    height, width = pixels.shape[:2]
    if not height or not width:
        raise ValueError(f"an empty image, {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width:,} x {height:,} pixels: one side is more than {MAX_ASPECT} times the other")
    if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
        raise ValueError("NaN or infinite pixels")
    return pixels


def upright_size(image: Any) -> tuple[int, int] | None:
    """Returns height and width of an opened PIL image as it will stand upright; None for what must be read first."""
    if not isinstance(image, Image.Image):
        return None
    width, height = image.size
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # Pillow turns TIFF itself
    return (width, height) if turned else (height, width)


def is_eight_bit(image: Any) -> bool:
    """Says whether an opened image is one of PIL's, which have 8 bits but for the modes "I" and "F"."""
    return isinstance(image, Image.Image) and not image.mode.startswith(("I", "F"))


def _from_pil(image: Image.Image, num_channels: int, least: int | None) -> np.ndarray:
    if image.format == "JPEG" and least is not None:
        image.draft(None, (least, least))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _with_channels(np.asarray(image).astype(np.uint16)[..., None], num_channels)
    if image.mode in ("I", "F"):
        return _with_channels(_standard(np.asarray(image))[..., None], num_channels)
    if num_channels not in (1, 3):
        if len(image.getbands()) != num_channels or image.mode == "P":
            raise ValueError(f"{len(image.getbands())} channels ({image.mode}), not {num_channels}")
        return np.asarray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif num_channels == 3 and image.mode in ("1", "L"):  # by numpy: PIL would pass through its four-byte pixels
        return np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=-1)
    pixels = np.asarray(image.convert("RGB" if num_channels == 3 else "L"))
    return pixels if num_channels == 3 else pixels[..., None]


def _from_array(image: Any, num_channels: int) -> np.ndarray:
    is_tensor = isinstance(image, Tensor)
    array = image.detach().cpu().numpy() if is_tensor else np.asarray(image)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"an image is a PIL image or an array of numbers, not {type(image).__name__} of {array.dtype}"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise ValueError(f"an image has the shape (H, W), (H, W, C) or (C, H, W), not {array.shape}")
    first, last = array.shape[0], array.shape[2]
    fits = {1, 3, 4, num_channels} if num_channels in (1, 3) else {num_channels}
    # The axis that holds the wanted number; where both could, that of the library that the object comes from.
    exact = [count == num_channels for count in (first, last)]
    candidates = exact if any(exact) else [count in fits for count in (first, last)]
    if not any(candidates):
        raise ValueError(f"an array of shape {array.shape}, not of {num_channels} channels")
    if candidates[0] and (not candidates[1] or is_tensor):
        array = array.transpose(1, 2, 0)
    return np.ascontiguousarray(_with_channels(_standard(array), num_channels))


def _standard(array: np.ndarray) -> np.ndarray:
    """Converts other types to one of the four that keeps their values."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.name in _INTEGERS or array.dtype == np.float32:
        return array
    if array.dtype == np.int8:
        return array.astype(np.int16)
    if array.dtype.kind in "ui" and array.size and max(-int(array.min()), int(array.max())) > 2**24:
        raise ValueError(f"{array.dtype} pixels of more than 24 bits; store fewer")
    return array.astype(np.float32)


def _with_channels(pixels_HWC: np.ndarray, num_channels: int) -> np.ndarray:
    """Repeats, blends or weighs channels, as PIL does with 8-bit images."""
    channels = pixels_HWC.shape[-1]
    if channels == num_channels:
        return pixels_HWC
    if channels == 4 and num_channels in (1, 3):
        high = _INTEGERS.get(pixels_HWC.dtype.name, (0, 1))[1]
        alpha = pixels_HWC[..., 3:].astype(np.float32) / high
        blended = pixels_HWC[..., :3] * alpha + high * (1 - alpha)
        return _with_channels(_like(blended, pixels_HWC.dtype), num_channels)
    if channels == 1 and num_channels == 3:
        return np.repeat(pixels_HWC, 3, axis=-1)
    if channels == 3 and num_channels == 1:
        if pixels_HWC.dtype == np.uint8:
            return np.asarray(Image.fromarray(np.ascontiguousarray(pixels_HWC)).convert("L"))[..., None]
        luma = pixels_HWC @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        return _like(luma[..., None], pixels_HWC.dtype)
    raise ValueError(f"{channels} channels, not {num_channels}")


def _like(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.astype(dtype) if dtype.kind == "f" else np.rint(values).astype(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Files, one library for each kind


def open_image(file: str | os.PathLike[str] | bytes | memoryview) -> Image.Image | np.ndarray:
    """Opens what Pillow reads, TIFF of any depth and number of channels, .npy, .npz and DICOM.

    Args:
        file: A path, or the encoded bytes.

    Returns:
        A PIL image that is not decoded yet, where 8 bits are all that there is; else an array, (H, W) or (H, W, C).

    Raises:
        ValueError, OSError: The file is empty, damaged or too large, or the library that reads it is not installed.
    """
    content: Any = bytes(file) if isinstance(file, bytes | memoryview) else _read(file)
    if not content:
        raise ValueError("an empty file of 0 bytes")
    if content.startswith(_NUMPY) or content.startswith(_ZIP):
        return _open_numpy(content)
    if content[128:132] == b"DICM":
        return _open_dicom(content)
    if content.startswith(_TIFF):
        return _open_tiff(content)
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no kind of image that the installed libraries read") from None
    if image.format in _RUNS_PROGRAMS:
        raise ValueError(f"{image.format} files are not read: another program would run; convert it to PNG")
    raw = str(image.tile[0].args) if image.tile else ""  # how the file stores pixels, in Pillow's words
    if ";16" not in raw and not (image.format == "PPM" and "(" in raw) or image.mode.startswith(("I", "F")):
        return image
    if image.format == "PNG":
        return _open_deep_png(content)
    raise ValueError(f"a color {image.format} of more than 8 bits, of which Pillow keeps 8; convert it to PNG or TIFF")


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _check_pixels(count: int) -> None:
    """Refuses what Pillow would refuse as a decompression bomb."""
    if Image.MAX_IMAGE_PIXELS is not None and count > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{count:,} pixels: more than the limit of {2 * Image.MAX_IMAGE_PIXELS:,}")


def _open_numpy(content: bytes) -> np.ndarray:
    loaded: Any = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    names = loaded.files
    if len(names) != 1:
        raise ValueError(f"holds {len(names)} arrays ({', '.join(names[:4])}); an image's .npz holds one")
    _check_pixels(loaded.zip.getinfo(f"{names[0]}.npy").file_size // (4 * MAX_CHANNELS))
    return cast(np.ndarray, loaded[names[0]])


def _open_deep_png(content: bytes) -> np.ndarray:
    """Reads a PNG of 16 bits and several channels, of which Pillow keeps 8 bits."""
    from torchvision.io import ImageReadMode, decode_image

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the function; what is to replace it needs FFmpeg
        pixels_CHW = decode_image(encoded, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    pixels = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels[..., :1] if pixels.shape[-1] == 2 else pixels  # grayscale: its transparency says nothing of it


def _open_tiff(content: bytes) -> Image.Image | np.ndarray:
    """Opens 8-bit TIFF of one page with Pillow, all others with tifffile: Pillow cannot say their type."""
    try:
        image: Any = Image.open(io.BytesIO(content))
        bits = np.max(image.tag_v2.get(_BITS_PER_SAMPLE, 1))
        if image.mode in _PIL_TIFF_MODES and bits <= 8 and image.n_frames == 1:
            return cast(Image.Image, image)
    except UnidentifiedImageError:
        image = None
    if tifffile is None:
        raise ValueError("a TIFF of more than 8 bits or several pages; pip install tifffile reads it")
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        series, page = tiff.series[0], tiff.series[0].keyframe
        _check_pixels(math.prod(series.shape) // MAX_CHANNELS)
        try:
            array = series.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
            raise ValueError("a compressed TIFF; pip install imagecodecs reads it") from None
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
            array = (2**page.bitspersample - 1) - array
        orientation = int(page.tags.valueof("Orientation", default=1))
    return _upright(_channels_last(array, series.axes), orientation)


def _channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    """Moves the one axis that is neither height nor width to the end: pages, planes or samples are the channels."""
    kept = [axis for axis, length in zip(axes, array.shape, strict=True) if length > 1 or axis in "YX"]
    array = array.reshape([n for n, axis in zip(array.shape, axes, strict=True) if n > 1 or axis in "YX"])
    others = [axis for axis in kept if axis not in "YX"]
    if len(others) > 1:
        raise ValueError(f"a TIFF of shape {array.shape}: several pages of several channels; write one image per file")
    return np.moveaxis(array, kept.index(others[0]), -1) if others else array


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the orientation that EXIF and TIFF count from 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _open_dicom(content: bytes) -> np.ndarray:
    """Reads DICOM: rescaled, windowed where the file says how, and light where it is bright.

    A window's output is spread over uint16; without one, values are those of the modality (of CT, Hounsfield units).
    """
    if pydicom is None:
        raise ValueError("a DICOM file; pip install 'hf-ssl-or[medical]' reads it")
    data = pydicom.dcmread(io.BytesIO(content))
    if "PixelData" not in data:
        raise ValueError("a DICOM file without pixels")
    _check_pixels(int(data.Rows) * int(data.Columns) * int(data.get("NumberOfFrames") or 1) // MAX_CHANNELS)
    try:
        array = pixel_array(data)
    except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"DICOM of transfer syntax {data.file_meta.TransferSyntaxUID.name!r}: {error}") from error
    if data.SamplesPerPixel > 1:
        return array
    if "NumberOfFrames" in data and array.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    values, bits = apply_rescale(array, data), int(data.BitsStored)
    if "WindowCenter" in data or "VOILUTSequence" in data:
        values = apply_voi_lut(values, data)
        # Every value below a window becomes its lowest output, every one above its highest.
        low, high = apply_voi_lut(np.array([-(2**30), 2**30]), data).astype(np.float64)
        values = np.rint((values - low) * (65535 / (high - low))).astype(np.uint16)
        low, high = 0, 65535
    else:
        first = -(2 ** (bits - 1)) if data.PixelRepresentation else 0
        low, high = apply_rescale(np.array([first, first + 2**bits - 1]), data)
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = (low + high - values.astype(np.float64)).astype(values.dtype)
    return values


ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it: half an image would pass for a whole one
