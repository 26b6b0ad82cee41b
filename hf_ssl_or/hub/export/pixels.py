"""What an encoder wants of images, in words and in lines of Python."""

from __future__ import annotations

from hf_ssl_or.hub.markdown import table
from hf_ssl_or.models.image_conversion import Preprocessing

TIMES = "\N{MULTIPLICATION SIGN}"

# Transforms of other libraries take upright RGB images; these lines are what `image_conversion.to_pixels` does.
OPEN_RGB = """\
image = ImageOps.exif_transpose(Image.open("PHOTO"))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert("RGB")
"""


def is_rgb(preprocessing: Preprocessing) -> bool:
    """Tells whether images are 8-bit RGB, for which other libraries have transforms that give the same pixels."""
    p = preprocessing
    return p.eight_bit and p.num_channels == 3 and p.value_range == (0, 255)


def pixel_table(preprocessing: Preprocessing, value_range: str = "") -> str:
    """Returns what becomes of an image, as a table.

    Args:
        preprocessing: What becomes of it.
        value_range: Where the range of values comes from.
    """
    p, origin = preprocessing, f", {value_range}" if value_range else ""
    side = f"{p.image_size:d}"
    if p.value_range == "dtype":
        values = "the full range of each image's type (of floats, 0 to 1) becomes 0 to 1"
    else:
        low, high = (f"{value:,.6g}" for value in p.value_range)
        values = f"{low} to {high} become 0 to 1; values outside are clipped"
    rows = [
        ("Images", f"{_kind(p)}; upright by EXIF"),
        ("Values", f"{values}{origin}"),
        (
            "Size",
            f"the shorter side is resized to {p.resize_to:d} pixels ({p.interpolation}, antialiased; crop_pct "
            f"{p.crop_pct:.6g}), the center is cropped to {side} {TIMES} {side}",
        ),
        ("Mean", _listed(p.mean)),
        ("Standard deviation", _listed(p.std)),
    ]
    return table(("", ""), rows, words=2)


def photo_name(preprocessing: Preprocessing) -> str:
    """Returns the name of an image file of the kind that an encoder takes, for examples."""
    if preprocessing.num_channels not in (1, 3):
        return "image.npy"
    if not preprocessing.eight_bit:
        return "image.tif"
    return "photo.jpg" if preprocessing.num_channels == 3 else "image.png"


def _kind(p: Preprocessing) -> str:
    depth = "of any depth" if p.value_range == "dtype" else "8-bit" if p.eight_bit else "of more than 8 bits"
    if p.num_channels == 3:
        return f"3 channels, {depth}; grayscale is repeated, transparency becomes white"
    if p.num_channels == 1:
        return f"1 channel, {depth}; colors become grayscale, transparency becomes white"
    return f"{p.num_channels:d} channels, {depth}"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
