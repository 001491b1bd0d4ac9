"""Pictures <-> grids of codes."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field

from onevocab.common.errors import UserError
from onevocab.tokenizers.autoencoder import AutoencoderConfig, GridAutoencoder
from onevocab.tokenizers.image_augment import ImageAugment, augment
from onevocab.tokenizers.media import load_image, to_rgb

# [image] fit -> (picture, (width, height)) -> a picture of that size
FITS = {
    "resize": lambda image, size: image.resize(size, Image.Resampling.BICUBIC),
    "crop": lambda image, size: ImageOps.fit(image, size, Image.Resampling.BICUBIC),
    "pad": lambda image, size: ImageOps.pad(image, size, Image.Resampling.BICUBIC, color="white"),
}


class ImageConfig(AutoencoderConfig):
    """[image]: the tokenizer of pictures."""

    size: tuple[int, int] = Field((64, 64), description="height and width in pixels that pictures are brought to")
    patch: int = Field(8, ge=2, multiple_of=2, description="pixels that a code covers each way")
    fit: Literal["resize", "crop", "pad"] = Field("resize", description="how a picture of other proportions gets "
                                                  "there: stretched; its middle cut out; or whole, with white around")
    max_side: int = Field(32, ge=1, le=4096, description="largest height or width, in codes, that the vocabulary has")
    steps: int = Field(1500, ge=1, description="training steps of the tokenizer")
    batch_size: int = Field(32, ge=1, description="pictures a step, over all ranks")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW's, for vectors; Muon's, for matrices, is five "
                                 "times as high")
    augment: ImageAugment = ImageAugment()


class ImageTokenizer(GridAutoencoder):
    """RGB pictures of any size that is a multiple of the patch; others are resized to the configured size.

    Codes are [rows, columns]. Pixel values are scaled to -1..1.
    """

    name = "image"
    Config = ImageConfig

    def __init__(self, config: ImageConfig):
        super().__init__(3, (config.patch, config.patch), config)
        if any(side % config.patch for side in config.size) or max(self.max_grid) > config.max_side:
            raise UserError(f"[image] size {config.size} must be a multiple of patch {config.patch}, "
                            f"at most max_side {config.max_side} codes a side")

    @property
    def layout(self) -> dict:
        """What the vocabulary needs to know: see `Vocabulary.build`."""
        return {"name": self.name, "sizes": self.config.max_side, "codes": self.quantizer.codebook_size, "rows": 0}

    @property
    def max_grid(self) -> tuple[int, int]:
        """Rows and columns of codes of a picture of the configured size: what is drawn has it."""
        rows, columns = (side // self.config.patch for side in self.config.size)
        return rows, columns * self.quantizer.codes_per_place

    def read(self, source) -> torch.Tensor:
        """PIL image, path or bytes -> uint8 (3, H, W) of the configured size, upright RGB (see `to_rgb`)."""
        image = to_rgb(source) if isinstance(source, Image.Image) else load_image(source)
        size = self.config.size[::-1]
        if image.size != size:
            image = FITS[self.config.fit](image, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def augmented(self, source, rng: np.random.Generator):
        """A picture as it is to be seen in training: altered, for a share of them, by [image.augment]."""
        if rng.random() >= self.config.augment.probability:
            return source
        image = to_rgb(source) if isinstance(source, Image.Image) else load_image(source)
        return augment(image, self.config.augment, rng)

    def training_set(self, files: Iterable[bytes]) -> torch.Tensor:
        """Files -> uint8 (n, 3, H, W); those that cannot be read are left out."""
        pictures = []
        for content in files:
            with suppress(UserError):
                pictures.append(self.read(content))
        return torch.stack(pictures) if pictures else torch.empty(0, 3, *self.config.size, dtype=torch.uint8)

    @staticmethod
    def batch(pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float -1..1"""
        return pixels.float() / 127.5 - 1

    @staticmethod
    def to_pictures(x: torch.Tensor) -> list[Image.Image]:
        """float (B, 3, H, W) -> pictures"""
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]

    def encode_batch(self, sources: list) -> list[np.ndarray]:
        """Pictures (see `read`) -> codes [rows, columns] each."""
        device = next(self.parameters()).device
        codes = [self.encode(self.batch(torch.stack([self.read(s) for s in sources[i : i + 64]]).to(device)))
                 for i in range(0, len(sources), 64)]
        return list(torch.cat(codes).cpu().numpy())

    def decode_batch(self, grids: list[np.ndarray]) -> list[Image.Image]:
        """Codes [rows, columns] each, any sizes -> pictures."""
        device = next(self.parameters()).device
        pictures = []
        for grid in grids:
            codes = torch.from_numpy(np.asarray(grid, np.int64)).to(device)
            pictures += self.to_pictures(self.decode(codes[None]))
        return pictures
