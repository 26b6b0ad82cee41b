from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hf_ssl_or.data.pixels import to_rgb, to_square

RGB = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


def through_file(image: Image.Image, format: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def test_an_image_of_the_wanted_size_keeps_its_bytes():
    np.testing.assert_array_equal(to_square(through_file(Image.fromarray(RGB), "PNG"), 24), RGB.transpose(2, 0, 1))
    np.testing.assert_array_equal(to_square(RGB, 24), RGB.transpose(2, 0, 1))


def test_grayscale_is_repeated():
    gray = to_square(through_file(Image.fromarray(RGB[..., 0]), "PNG"), 24)
    np.testing.assert_array_equal(gray, np.broadcast_to(RGB[..., 0], (3, 24, 24)))


def test_sixteen_bits_become_eight_without_clipping():
    wide = RGB[..., 0].astype(np.uint16) * 257
    result = to_square(through_file(Image.fromarray(wide), "PNG"), 24)
    np.testing.assert_array_equal(result[1], RGB[..., 0])


def test_transparency_becomes_white():
    alpha = np.full((24, 24, 1), 255, np.uint8)
    alpha[:12] = 0
    result = to_square(through_file(Image.fromarray(np.concatenate([RGB, alpha], -1)), "PNG"), 24)
    assert (result[:, :12] == 255).all()
    np.testing.assert_array_equal(result[:, 12:], RGB.transpose(2, 0, 1)[:, 12:])


def test_palette_with_a_transparent_colour():
    image = Image.fromarray((RGB[..., 0] > 127).astype(np.uint8), mode="P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    result = to_square(through_file(image, "PNG", transparency=0), 24)
    np.testing.assert_array_equal(result[:, 0, 0], [200, 100, 50] if RGB[0, 0, 0] > 127 else [255, 255, 255])
    assert {tuple(pixel) for pixel in result.reshape(3, -1).T} == {(200, 100, 50), (255, 255, 255)}


def test_cmyk_keeps_its_colours():
    red = Image.new("RGB", (24, 24), (200, 30, 40))
    result = to_square(through_file(red.convert("CMYK"), "TIFF"), 24)
    np.testing.assert_allclose(result.reshape(3, -1).mean(1), [200, 30, 40], atol=3)


def test_orientation_of_a_camera_is_undone():
    upright = Image.fromarray(np.arange(24 * 24, dtype=np.uint32).astype(np.uint8).reshape(24, 24)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90 degrees clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(np.asarray(to_rgb(through_file(stored, "PNG", exif=exif))), np.asarray(upright))


def test_other_shapes_give_the_centre():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    resized = wide.resize((30, 10), Image.Resampling.BILINEAR).crop((10, 0, 20, 10))
    np.testing.assert_allclose(to_square(wide, 10), np.asarray(resized, dtype=int).transpose(2, 0, 1), atol=1)
    assert to_square(wide, 50).shape == (3, 50, 50)


def test_large_jpeg_is_decoded_small_and_right():
    ramp = np.tile(np.linspace(0, 255, 1024, dtype=np.uint8), (1024, 1))
    result = to_square(through_file(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=95), 16)
    np.testing.assert_allclose(result[0, 3], (np.arange(16) + 0.5) * 16 * 255 / 256, atol=3)


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="8 or 16 bits"):
        to_square(Image.fromarray(RGB[..., 0].astype(np.float32)), 24)
