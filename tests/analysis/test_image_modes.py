"""Images of any mode become what a person sees in them."""

import io

import numpy as np
import pytest
from PIL import Image as PIL
from transformers import DeiTImageProcessorPil

from hf_neural_attention.analysis import as_seen, to_rgb
from hf_neural_attention.analysis.image_modes import SIXTEEN_BITS


RED, WHITE, BLACK = [255, 0, 0], [255, 255, 255], [0, 0, 0]


def rgb(image: PIL.Image) -> list[list[int]]:
    """Pixels of the first row."""
    converted = to_rgb(image)
    assert converted.mode == "RGB" and converted.size == image.size
    return np.asarray(converted)[0].tolist()


def through(image: PIL.Image, kind: str) -> PIL.Image:
    """Written to a file and read again."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return PIL.open(io.BytesIO(buffer.getvalue()))


RAMP = np.array([[0, 257, 32896, 65278, 65535]], dtype=np.uint16)
IN_EIGHT_BITS = [[grey] * 3 for grey in (0, 1, 128, 254, 255)]


@pytest.mark.parametrize("kind", (None, "PNG", "TIFF"))
def test_sixteen_bits_are_scaled_to_eight(kind):
    image = PIL.fromarray(RAMP)
    assert image.mode == "I;16"
    if kind is not None:
        image = through(image, kind)  # some are read as mode I
    assert rgb(image) == IN_EIGHT_BITS


def test_sixteen_bits_of_a_ppm_file():
    # writes the file itself, which not every version of Pillow does
    assert rgb(PIL.open(io.BytesIO(b"P5 5 1 65535\n" + RAMP.astype(">u2").tobytes()))) == IN_EIGHT_BITS


def test_sixteen_bits_in_the_other_order():
    image = PIL.frombytes("I;16B", (5, 1), RAMP.astype(">u2").tobytes())
    assert image.mode in SIXTEEN_BITS and rgb(image) == IN_EIGHT_BITS


@pytest.mark.parametrize(("dtype", "words"), ((np.int32, "integers of 32 bits"), (np.float32, "floating-point numbers")))
def test_numbers_without_a_range_are_refused(dtype, words):
    with pytest.raises(ValueError, match=f"its pixels are {words} .* save it with 8 or 16 bits"):
        to_rgb(PIL.fromarray(RAMP.astype(dtype)))


def test_palettes_grey_and_black_and_white():
    palette = PIL.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 255, 255, 255])
    palette.putdata([0, 1])
    assert rgb(palette) == [RED, WHITE]
    assert rgb(PIL.new("L", (1, 1), 90)) == [[90] * 3] and rgb(PIL.new("1", (1, 1), 1)) == [WHITE]
    assert rgb(PIL.new("RGB", (1, 1), (1, 2, 3))) == [[1, 2, 3]]


def test_what_is_transparent_is_white():
    assert rgb(PIL.new("RGBA", (1, 1), (0, 0, 0, 0))) == [WHITE] and rgb(PIL.new("RGBA", (1, 1), (255, 0, 0, 255))) == [RED]
    assert rgb(PIL.new("RGBA", (1, 1), (255, 0, 0, 51))) == [[255, 204, 204]]
    assert rgb(PIL.new("LA", (1, 1), (0, 0))) == [WHITE] and rgb(PIL.new("LA", (1, 1), (90, 255))) == [[90] * 3]
    assert rgb(PIL.new("LA", (1, 1), (0, 0)).convert("La")) == [WHITE]
    assert rgb(PIL.new("RGBA", (1, 1), (9, 9, 9, 0)).convert("RGBa")) == [WHITE]
    colour = PIL.new("RGB", (2, 1), (255, 0, 0))
    colour.putpixel((1, 0), (0, 0, 0))
    colour.info["transparency"] = (0, 0, 0)  # one colour, as PNG and GIF may have it
    assert rgb(colour) == [RED, WHITE] and rgb(through(colour, "PNG")) == [RED, WHITE]
    deep = PIL.fromarray(np.array([[0, 65535, 257]], dtype=np.uint16))
    deep.info["transparency"] = 0
    assert rgb(deep) == [WHITE, WHITE, [1] * 3]


def test_inks_are_subtracted_from_white():
    assert rgb(PIL.new("CMYK", (1, 1), (0, 0, 0, 0))) == [WHITE] and rgb(PIL.new("CMYK", (1, 1), (0, 0, 0, 255))) == [BLACK]
    image = PIL.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert rgb(image)[0] == RED and np.allclose(rgb(through(image, "JPEG"))[0], RED, atol=3)


@pytest.mark.parametrize(("kind", "dtype"), (("JPEG", np.uint8), ("PNG", np.uint8), ("PNG", np.uint16)))
def test_images_stand_upright(kind, dtype):
    image = PIL.fromarray((np.array([[0] * 8, [1] * 8] * 1).repeat(4, 0) * np.iinfo(dtype).max).astype(dtype))
    exif = PIL.Exif()
    exif[0x0112] = 6  # the camera was turned to the left
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    upright = np.asarray(to_rgb(PIL.open(buffer)))
    assert upright[:, 0].min() > 240 and upright[:, -1].max() < 15


@pytest.mark.parametrize("crops", (False, True))
def test_what_a_model_sees_of_an_image(crops: bool):
    image = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    processor = DeiTImageProcessorPil(do_resize=False, do_center_crop=crops, crop_size={"height": 8, "width": 8})
    seen = as_seen(image, processor(image, return_tensors="pt")["pixel_values"][0], processor)
    expected = np.asarray(image)[2:10, 4:12] if crops else np.asarray(image)
    assert np.array_equal(np.asarray(seen), expected)
