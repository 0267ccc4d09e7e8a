"""Pictures to classify."""

import numpy as np
from PIL import Image


def random_pictures(count: int, side: int = 8) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
