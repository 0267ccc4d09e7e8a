"""Images that cannot be read are named before any training."""

import io

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL

from tests.helpers.pictures import random_pictures
from training.pixel_values import check_images


def encoded(kind: str, image: PIL.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or random_pictures(1, side=40)[0]).save(buffer, kind)
    return buffer.getvalue()


def stored(*images: dict | None) -> Dataset:
    features = Features({"image": Image(), "row": Value("int64")})
    return Dataset.from_dict({"image": list(images), "row": range(10, 10 + len(images))}, features=features)


def as_file(content: bytes, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"))
def test_a_file_that_is_cut_off_is_named(kind):
    whole = encoded(kind)
    check_images(stored(as_file(whole)), "Split train")
    with pytest.raises(SystemExit, match=r"Split train has 1 image\(s\) that cannot be read: cut\.x \("):
        check_images(stored(as_file(whole), as_file(whole[: len(whole) // 2], "cut.x")), "Split train")


def test_images_are_named_by_reason():
    good, floats = encoded("PNG"), encoded("TIFF", PIL.new("F", (4, 4)))
    data = stored(as_file(good), None, as_file(b"no image", "a.png"), as_file(b"", "b.png"), *[as_file(floats)] * 5)
    with pytest.raises(SystemExit) as caught:
        check_images(data, "Split test of data")
    said = str(caught.value)
    assert said.startswith(
        "Split test of data has 8 image(s) that cannot be read: row 11 (there is no image); a.png, b.png (it"
    )
    assert "row 14, row 15, row 16, ... (its pixels are floating-point numbers (mode F)" in said and "Rows are counted" in said
