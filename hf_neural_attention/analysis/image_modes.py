"""The modes that images come in (grey, palette, alpha, CMYK, 16 bits), and the one that models take."""

from typing import Any

import numpy as np


SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
HAVE_SIXTEEN_BITS = ("PNG", "PPM")  # lists formats whose integers, where Pillow gives them mode I, go up to 65,535


def to_rgb(image: Any) -> Any:
    """The image in RGB of 8 bits, as a person would see it: turned as its camera says, 16 bits scaled to 8, transparent parts
    white.

    Args:
        image (`PIL.Image.Image`): Of any mode; it stays as it is.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        ValueError: if its mode does not say which values are black and white (I, F).
    """
    from PIL import Image, ImageOps  # imports here, since not everybody has Pillow

    form = image.format  # is lost where the image is turned
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and form in HAVE_SIXTEEN_BITS):
        values, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind} (mode {image.mode}), of which nothing says what is black and what is white; save it with "
            "8 or 16 bits"
        )
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_seen(image: Any, pixel_values: Any, processor: Any) -> Any:
    """What a model sees of an image: the image itself, but for processors that cut its middle out (DeiT's, DINOv2's).

    Args:
        image (`PIL.Image.Image`): Of mode RGB.
        pixel_values (`torch.Tensor`): `[3, height, width]`, what the processor makes of it.
        processor: an image processor of Transformers.

    Returns:
        `PIL.Image.Image` of mode RGB, as large as `pixel_values` where it is cut.
    """
    if not getattr(processor, "do_center_crop", None):
        return image
    from PIL import Image

    values = pixel_values.detach().float().cpu().numpy().transpose(1, 2, 0)
    if getattr(processor, "do_normalize", None):
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if getattr(processor, "do_rescale", None):
        values = values / processor.rescale_factor
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
