"""The modes that images come in (grey, palette, alpha, CMYK, 16 bits), and the one that models take."""

import numpy as np
from PIL import Image as PIL


SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
HAVE_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integers, where Pillow gives them mode I, go up to 65,535


def to_rgb(image: PIL.Image) -> PIL.Image:
    """The image in RGB of 8 bits, as a person would see it: 16 bits scaled to 8, transparent parts white.

    Raises:
        ValueError: if its mode does not say which values are black and white (I, F).
    """
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in HAVE_SIXTEEN_BITS):
        image = PIL.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its pixels are {kind} (mode {image.mode}), of which nothing says what is black and what is white; save it with "
            "8 or 16 bits"
        )
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = PIL.alpha_composite(PIL.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
