"""From any file to pixels: modes, depths, channels and orientations, and the square that an encoder gets."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
import tifffile
import timm
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGLosslessSV1
from torchvision.transforms import v2

from hf_ssl_or.models.image_conversion import (
    Preprocessing,
    normalize_pixels,
    open_image,
    resize_and_crop,
    scale_pixels,
    to_pixels,
    upright_size,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (24, 30), dtype=np.uint16)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def numpy_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def dicom(stored: np.ndarray, *, bits: int = 12, photometric: str = "MONOCHROME2", **elements: object) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = stored.shape[:2]
    data.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * stored.itemsize, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PhotometricInterpretation = photometric
    if stored.ndim == 3:
        data.PlanarConfiguration = 0
    if elements.pop("pixels", True):
        data.PixelData = stored.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_rgb_keeps_its_bytes(format):
    np.testing.assert_array_equal(to_pixels(encoded(Image.fromarray(RGB), format)), RGB)


@pytest.mark.parametrize("format", ["HEIF", "AVIF", "WEBP"])
def test_photos_of_other_formats_are_read_and_stand_upright(format):
    y, x = np.mgrid[:24, :32]
    picture = Image.fromarray(np.stack([8 * x, 10 * y, np.full_like(x, 90)], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise; HEIF says so elsewhere, and its readers pass over EXIF
    stored = picture if format == "HEIF" else picture.transpose(Image.Transpose.ROTATE_90)
    content = encoded(stored, format, quality=95, exif=exif)
    opened = open_image(content)
    assert upright_size(opened) == (24, 32)
    np.testing.assert_allclose(to_pixels(opened).astype(int), np.asarray(picture), atol=25)


def test_arrays_and_tensors_of_either_layout_keep_their_values():
    for image in (RGB, torch.from_numpy(RGB), RGB.transpose(2, 0, 1), torch.from_numpy(RGB).permute(2, 0, 1)):
        np.testing.assert_array_equal(to_pixels(image), RGB)
    six = RNG.integers(0, 9, (6, 20, 6), dtype=np.uint8)  # both ends fit: the library's own layout
    np.testing.assert_array_equal(to_pixels(six, 6), six)
    np.testing.assert_array_equal(to_pixels(torch.from_numpy(six), 6), six.transpose(1, 2, 0))


def test_grayscale_stays_one_channel_or_is_repeated():
    content = encoded(Image.fromarray(RGB[..., 0]), "PNG")
    np.testing.assert_array_equal(to_pixels(content, 1), RGB[..., :1])
    np.testing.assert_array_equal(to_pixels(content, 3), np.repeat(RGB[..., :1], 3, -1))
    np.testing.assert_array_equal(to_pixels(RGB, 1)[..., 0], np.asarray(Image.fromarray(RGB).convert("L")))


def test_black_and_white_is_0_and_255():
    bits = RGB[..., 0] > 127
    for image in (Image.fromarray(bits), bits):
        assert set(np.unique(to_pixels(image, 1))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    alpha = np.full((24, 30), 255, np.uint8)
    alpha[:12] = 0
    image = Image.fromarray(RGB).convert("L").convert("RGB")
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":
        image = Image.fromarray((alpha == 0).astype(np.uint8), mode="P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        content = encoded(image, "PNG", transparency=1)
        bottom = np.broadcast_to([10, 20, 30], (12, 30, 3))
    else:
        content = encoded(image.convert(mode), "PNG")
        bottom = np.asarray(image.convert("RGB"))[12:]
    result = to_pixels(content)
    assert (result[:12] == 255).all()
    np.testing.assert_array_equal(result[12:], bottom)


def test_four_channels_of_an_array_are_rgba_where_three_are_wanted_and_themselves_where_four_are():
    half = np.concatenate([RGB, np.full((24, 30, 1), 128, np.uint8)], -1)
    wanted = np.asarray(
        Image.alpha_composite(Image.new("RGBA", (30, 24), "white"), Image.fromarray(half)).convert("RGB")
    )
    np.testing.assert_allclose(to_pixels(half).astype(int), wanted, atol=1)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(half)), wanted)
    np.testing.assert_array_equal(to_pixels(half, 4), half)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(half), 4), half)


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_keeps_its_colors(format):
    red = Image.new("RGB", (24, 24), (200, 30, 40)).convert("CMYK")
    np.testing.assert_allclose(to_pixels(encoded(red, format)).reshape(-1, 3).mean(0), [200, 30, 40], atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_the_orientation_of_a_camera_is_undone(orientation, format):
    y, x = np.mgrid[:24, :32]
    upright = Image.fromarray(np.stack([8 * x, 10 * y, 4 * (x + y) % 256], -1).astype(np.uint8))
    # What a camera that was held so did to the picture: the inverse of what EXIF asks a reader to do.
    held = (
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    )
    turn = held[orientation - 1]
    stored = upright if turn is None else upright.transpose(getattr(Image.Transpose, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, format, exif=exif, **({"quality": 98} if format == "JPEG" else {}))
    opened = open_image(content)
    assert upright_size(opened) == (24, 32)
    np.testing.assert_allclose(to_pixels(opened).astype(int), np.asarray(upright), atol=20 if format == "JPEG" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# More bits, other channels


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grayscale_keeps_every_value(bits, format):
    deep = RNG.integers(0, 2**bits, (24, 30), dtype=np.uint16)
    result = to_pixels(encoded(Image.fromarray(deep), format), 1)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result[..., 0], deep)
    np.testing.assert_array_equal(to_pixels(encoded(Image.fromarray(deep), format), 3), np.repeat(result, 3, -1))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_of_sixteen_bits_and_several_channels_keeps_them(channels):
    deep = RNG.integers(0, 65536, (channels, 24, 30), dtype=np.uint16)
    if channels == 4:
        deep[3] = 65535
    # PNG signature, header, one chunk of data, end: Pillow and torchvision write 8 bits only.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30, 24, 16, 2 if channels == 3 else 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep.transpose(1, 2, 0))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    result = to_pixels(content)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, deep[:3].transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("shape", [(24, 30), (24, 30, 3), (6, 24, 30), (24, 30, 5)], ids=str)
def test_tiff_of_any_depth_and_channels(dtype, shape):
    array = (RNG.random(shape) * 200 - (50 if np.dtype(dtype).kind in "if" else 0)).astype(dtype)
    options = {"photometric": "rgb"} if shape[-1] == 3 else {"photometric": "minisblack"}
    if shape == (24, 30, 5):
        options["planarconfig"] = "contig"
    channels = 1 if len(shape) == 2 else 6 if shape[0] == 6 else shape[-1]
    result = to_pixels(tiff(array, **options), channels)
    assert result.dtype == dtype
    wanted = array[..., None] if channels == 1 else array.transpose(1, 2, 0) if channels == 6 else array
    np.testing.assert_array_equal(result, wanted)


def test_compressed_and_inverted_tiff():
    np.testing.assert_array_equal(to_pixels(tiff(DEEP, compression="zlib"), 1)[..., 0], DEEP)
    np.testing.assert_array_equal(to_pixels(tiff(DEEP, compression="lzw"), 1)[..., 0], DEEP)
    np.testing.assert_array_equal(to_pixels(tiff(DEEP, photometric="miniswhite"), 1)[..., 0], 65535 - DEEP)


def test_other_types_keep_their_values():
    for dtype, kept in (
        (np.int8, np.int16),
        (np.int32, np.float32),
        (np.float64, np.float32),
        (np.float16, np.float32),
    ):
        array = RNG.integers(-100, 100, (9, 9)).astype(dtype)
        result = to_pixels(numpy_file(array), 1)
        assert result.dtype == kept
        np.testing.assert_array_equal(result[..., 0], array)


def test_npz_of_one_array():
    file = io.BytesIO()
    np.savez_compressed(file, scan=DEEP)
    np.testing.assert_array_equal(to_pixels(file.getvalue(), 1)[..., 0], DEEP)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def test_dicom_keeps_stored_values_and_inverts_monochrome1():
    np.testing.assert_array_equal(to_pixels(dicom(DEEP), 1)[..., 0], DEEP)
    np.testing.assert_array_equal(to_pixels(dicom(DEEP, photometric="MONOCHROME1"), 1)[..., 0], 4095 - DEEP)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_is_rescaled(photometric):
    signed = (DEEP.astype(np.int16) - 2048).astype(np.int16)
    result = to_pixels(dicom(signed, photometric=photometric, RescaleSlope=2, RescaleIntercept=-10), 1)[..., 0]
    wanted = signed.astype(float) * 2 - 10
    low, high = -2048 * 2 - 10, 2047 * 2 - 10
    np.testing.assert_allclose(result, wanted if photometric == "MONOCHROME2" else low + high - wanted)
    assert result.dtype == np.float32


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_is_spread_over_sixteen_bits(photometric):
    content = dicom(
        DEEP, photometric=photometric, WindowCenter=1000, WindowWidth=400, RescaleSlope=1, RescaleIntercept=-500
    )
    values = DEEP.astype(float) - 500
    wanted = ((values - 999.5) / 399 + 0.5).clip(0, 1)  # DICOM PS3.3 C.11.2.1.2.1
    result = to_pixels(content, 1)[..., 0]
    assert result.dtype == np.uint16
    np.testing.assert_allclose(result / 65535, wanted if photometric == "MONOCHROME2" else 1 - wanted, atol=2e-5)


def test_color_dicom_is_rgb():
    np.testing.assert_array_equal(to_pixels(dicom(RGB, bits=8, photometric="RGB")), RGB)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("content", "channels", "message"),
    [
        (b"", 3, "empty file of 0 bytes"),
        (b"words", 3, "no kind of image"),
        (encoded(Image.fromarray(RGB), "PNG")[:200], 3, "."),
        (encoded(Image.new("L", (606, 6)), "PNG"), 3, "one side is more than 100 times the other"),
        (numpy_file(np.zeros((0, 5))), 1, "empty image"),
        (numpy_file(np.full((9, 9), np.nan)), 1, "NaN or infinite"),
        (tiff(np.full((9, 9), np.inf, np.float32)), 1, "NaN or infinite"),
        (numpy_file(np.zeros((9, 9, 6))), 3, "not of 3 channels"),
        (numpy_file(np.zeros((9, 9, 4))), 6, "not of 6 channels"),
        (encoded(Image.fromarray(RGB), "PNG"), 6, r"3 channels \(RGB\), not 6"),
        (numpy_file(np.zeros((2, 2, 9, 9))), 3, "has the shape"),
        (numpy_file(np.array(["a"])), 3, "array of numbers"),
        (numpy_file(np.full((9, 9), 2**30)), 1, "more than 24 bits"),
        (tiff(np.zeros((2, 9, 9, 3), np.uint8), photometric="rgb"), 3, "several pages of several channels"),
        (dicom(DEEP, pixels=False), 1, "without pixels"),
        (dicom(DEEP, syntax=JPEGLosslessSV1, pixels=False, PixelData=encapsulate([b"\0\0"])), 1, "transfer syntax"),
        (b"P6 4 4 65535\n" + bytes(96), 3, "a color PPM of more than 8 bits"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 3, "EPS files are not read"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_read_is_one_line(content, channels, message):
    with pytest.raises((ValueError, OSError), match=message):
        to_pixels(content, channels)


def test_pickles_are_not_loaded():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        to_pixels(file.getvalue())
    file = io.BytesIO()
    np.savez(file, a=RGB, b=RGB)
    with pytest.raises(ValueError, match="holds 2 arrays"):
        to_pixels(file.getvalue())


@pytest.mark.parametrize("kind", ["png", "tiff", "npz", "dicom"])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    deep = np.zeros((400, 400), np.uint16)
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros((2000, 2000)))
    contents = {"png": encoded(Image.fromarray(deep), "PNG"), "tiff": tiff(deep), "npz": file.getvalue()}
    contents["dicom"] = dicom(deep)
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        to_pixels(contents[kind], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry and values


@pytest.mark.parametrize("shape", [(40, 40), (40, 80), (80, 40), (33, 57), (300, 41), (20, 24)], ids=str)
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.95])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_square_is_timms_and_torchvisions_bit_by_bit(shape, crop_pct, interpolation):
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = Preprocessing(image_size=32, crop_pct=crop_pct, interpolation=interpolation, mean=mean, std=std)
    square = ours.square(image)
    x = torch.from_numpy(square.copy()).permute(2, 0, 1)
    found = normalize_pixels(scale_pixels(x, ours.value_range), mean, std)
    config = {
        "input_size": (3, 32, 32),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "mean": mean,
        "std": std,
    }
    assert torch.equal(found, timm.data.create_transform(**config, crop_mode="center", is_training=False)(image))
    chain = [v2.Resize(ours.resize_to, interpolation=v2.InterpolationMode(interpolation)), v2.CenterCrop(32)]
    np.testing.assert_array_equal(square, np.asarray(v2.Compose(chain)(image)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 6])
def test_wide_pixels_are_resized_without_rounding(dtype, channels):
    array = RNG.integers(0, 4096, (60, 90, channels)).astype(dtype)
    found = resize_and_crop(array, 32, 28)
    assert found.dtype == np.float32
    chain = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])
    wanted = chain(torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)).permute(1, 2, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_values_are_scaled_and_clipped():
    x = torch.tensor([0, 100, 600, 1100, 5000], dtype=torch.uint16)
    torch.testing.assert_close(scale_pixels(x, (100.0, 1100.0)), torch.tensor([0, 0, 0.5, 1, 1]))
    assert torch.equal(scale_pixels(torch.tensor([0, 255], dtype=torch.uint8), (0, 255)), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(scale_pixels(torch.tensor([-1.0, 0.25, 2.0]), "dtype"), torch.tensor([0, 0.25, 1]))


def test_each_type_has_its_own_range_where_that_is_wanted():
    ours = Preprocessing(image_size=8, num_channels=1, value_range="dtype", mean=(0,), std=(1,))
    for array, wanted in (
        (np.full((9, 12), 51, np.uint8), 0.2),
        (np.full((9, 12), 13107, np.uint16), 0.2),
        (np.full((9, 12), -32768, np.int16), 0.0),
        (np.full((9, 12), 0.2, np.float32), 0.2),
    ):
        scaled = scale_pixels(torch.from_numpy(ours.square(array)), "dtype")
        torch.testing.assert_close(scaled, torch.full((8, 8, 1), wanted), atol=1e-6, rtol=0)


def test_pixels_of_another_kind_are_refused():
    eight = Preprocessing(image_size=8)
    wide = Preprocessing(image_size=8, eight_bit=False, value_range=(0, 4095))
    with pytest.raises(ValueError, match="uint16 pixels, but those of the set are 8-bit"):
        eight.square(DEEP)
    with pytest.raises(
        ValueError, match=r"uint8 pixels, but those of the set are wider, with the range \[0.0, 4095.0\]"
    ):
        wide.square(RGB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"num_channels": 33}, "num_channels: 1 to 32"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"value_range": (3, 3)}, "value_range"),
        ({"mean": (0.5,)}, "mean: 3 numbers"),
        ({"std": (0.5, 0.5, 0)}, "std: positive"),
    ],
)
def test_bad_preprocessing_names_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"image_size": 8, **settings})


def test_preprocessing_survives_json():
    ours = Preprocessing(image_size=8, num_channels=1, eight_bit=False, value_range=(5, 9), mean=(0.1,), std=(0.2,))
    assert Preprocessing(**ours.to_dict()) == ours
