"""One preparation of pictures: orientation, kinds of pixels, fitting, augmentation."""

import io

import numpy as np
import pytest
from PIL import Image

from onevocab.common.errors import UserError
from onevocab.tokenizers.image_augment import ImageAugment
from onevocab.tokenizers.image_tokenizer import ImageConfig, ImageTokenizer
from onevocab.tokenizers.media import load_image, to_rgb

ORIENTATION = 0x0112  # of EXIF
# What undoes each orientation, by the tag's definition (EXIF 2.32, 4.6.4).
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 8: lambda a: np.rot90(a, -1),
          7: lambda a: np.rot90(a, 2).transpose(1, 0, 2)}


def corners() -> np.ndarray:
    """uint8 (20, 40, 3), another colour in each quarter."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    return pixels


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_are_upright(orientation, kind):
    """A phone stores what its sensor saw, and in which way it was held."""
    stored, exif = Image.fromarray(np.ascontiguousarray(STORED[orientation](corners()))), Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    stored.save(file, kind, exif=exif, **({"quality": 95} if kind == "jpeg" else {}))
    opened = Image.open(io.BytesIO(file.getvalue()))  # as a prompt's part
    for picture in (load_image(file.getvalue()), to_rgb(opened)):
        assert picture.size == (40, 20)
        assert np.abs(np.asarray(picture, int) - corners())[2:-2:5, 2:-2:5].max() < 60


@pytest.mark.parametrize("mode, values, right", [
    ("F", [[0.0, 0.5, 1.0]], [0, 128, 255]), ("F", [[0.0, 128.0, 255.0]], [0, 128, 255]),
    ("I", [[0, 128, 255]], [0, 128, 255]), ("I", [[0, 32896, 65535]], [0, 128, 255]),
    ("I;16", [[0, 32896, 65535]], [0, 128, 255])])
def test_every_depth_is_brought_to_eight_bits(mode, values, right):
    kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    picture = Image.fromarray(np.array(values, kind))
    assert picture.mode == mode
    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == right


@pytest.mark.parametrize("values", [[[0.0, np.nan]], [[-1.0, 0.0]], [[0.0, 20_000.0]]])
def test_values_of_no_picture_are_refused(values):
    with pytest.raises(UserError, match="scale them"):
        to_rgb(Image.fromarray(np.array(values, np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV",
                                  "LAB"])
def test_every_mode_becomes_rgb_over_white(mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    steps = {"RGBa": ["RGBa"], "La": ["LA", "La"], "PA": ["LA", "PA"], "LAB": [], "P": ["P"]}.get(mode, [mode])
    picture = Image.new("LAB", (4, 4)) if mode == "LAB" else clear
    for step in steps:
        picture = picture.convert(step)
    assert picture.mode == mode and to_rgb(picture).mode == "RGB"
    if mode in ("LA", "La", "RGBA", "RGBa"):
        assert np.asarray(to_rgb(picture)).min() == 255, "transparency is laid over white"


@pytest.mark.parametrize("fit, middle, edge", [("resize", 200, 0), ("crop", 200, 200), ("pad", 200, 255)])
def test_other_proportions_are_fitted_as_the_setting_says(fit, middle, edge):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200  # its middle third
    tokenizer = ImageTokenizer(ImageConfig(size=(32, 32), fit=fit))
    pixels = tokenizer.read(Image.fromarray(wide)).numpy()[0]
    assert pixels.shape == (32, 32) and abs(int(pixels[16, 16]) - middle) < 12
    assert abs(int(pixels[1, 1] if fit == "pad" else pixels[16, 2]) - edge) < 12


def test_augmentation_is_mild_random_and_off_unless_asked_for():
    picture = Image.fromarray(corners())
    assert not ImageTokenizer(ImageConfig()).augments
    tokenizer = ImageTokenizer(ImageConfig(augment=ImageAugment(probability=1.0)))
    altered = [tokenizer.augmented(picture, np.random.default_rng(seed)) for seed in range(20)]
    assert all(32 <= one.width <= 40 and 16 <= one.height <= 20 for one in altered)
    assert len({one.tobytes() for one in altered}) > 15
    again = tokenizer.augmented(picture, np.random.default_rng(3))
    assert again.tobytes() == altered[3].tobytes()


def test_a_picture_of_one_pixel_survives_augmentation():
    tokenizer = ImageTokenizer(ImageConfig(augment=ImageAugment(probability=1.0, crop=0.49)))
    assert min(tokenizer.augmented(Image.new("RGB", (1, 1)), np.random.default_rng(0)).size) >= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_broken_exif_costs_no_picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(buffer, kind, exif=b"garbage")
    assert load_image(buffer.getvalue()).size == (8, 4)
