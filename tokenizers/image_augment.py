"""Pictures a little closer, and in other light: what is seen is altered in training, what is to be drawn is not."""

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import BaseModel, ConfigDict, Field


class ImageAugment(BaseModel):
    """[image.augment]"""

    model_config = ConfigDict(frozen=True, extra="forbid")
    probability: float = Field(0.0, ge=0, le=1, description="share of the pictures that are seen, not drawn, that are "
                               "altered before they are encoded for training")
    crop: float = Field(0.1, ge=0, lt=0.5, description="at most this share of each side is cut away (places move: keep "
                        "it small, or 0, where captions name them)")
    colour: float = Field(0.1, ge=0, lt=1, description="brightness, contrast and saturation change by at most this "
                          "share")


def augment(image: Image.Image, config: ImageAugment, rng: np.random.Generator) -> Image.Image:
    """RGB -> RGB: a random crop, then brightness, contrast and saturation, each evenly from its range."""
    width, height = image.size
    left, top, right, bottom = rng.uniform(0, config.crop, 4) * (width, height, width, height)
    image = image.crop((int(left), int(top), max(int(left) + 1, round(width - right)),
                        max(int(top) + 1, round(height - bottom))))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + rng.uniform(-config.colour, config.colour))
    return image
