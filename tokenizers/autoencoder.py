"""The convolutional autoencoder around a quantizer that turns a picture or a spectrogram into a grid of codes.

The encoder sees one patch a code (plus what `encoder_kernel` > 1 adds): a code then depends on little but its own
patch, the same patch gives the same code wherever it stands, and such codes are easy for the decoder Transformer to
predict. The decoder may look around (3x3), so it hides the seams.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onevocab.tokenizers.quantizers import DEFAULT_CONFIG, AnyQuantizerConfig, build_quantizer


class AutoencoderConfig(BaseModel):
    """The network of a media tokenizer and its quantizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    width: int = Field(128, ge=8, description="channels at the grid of codes")
    fine_width: int = Field(64, ge=8, description="channels after the decoder's first upsampling, by two")
    encoder_blocks: int = Field(2, ge=0, description="residual blocks of the encoder")
    encoder_kernel: int = Field(1, ge=1, le=7, description="patches each way that an encoder's convolution sees; 1: a "
                                "code depends on its own patch alone")
    decoder_blocks: int = Field(2, ge=0, description="residual blocks of the decoder, at the grid")
    decoder_kernel: int = Field(3, ge=1, le=7, description="places each way that a convolution of these blocks sees")
    fine_blocks: int = Field(2, ge=0, description="residual blocks of the decoder after its first upsampling")
    global_context: bool = Field(False, description="the decoder also sees the mean over the whole grid, so that what "
                                 "all patches share (a background) need not be said by each code")
    quantizer: AnyQuantizerConfig = Field(DEFAULT_CONFIG, description="vectors to codes: a kind and its settings")


class Block(nn.Module):
    """x + conv(gelu(conv(gelu(x)))), the last convolution started at zero: stable without normalisation, which would
    mix distant patches."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class GlobalContext(nn.Module):
    """x + a linear map of x's mean over the grid (squeeze-and-excitation's pooling, Hu et al. 2018, added)."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(x).mean((2, 3), keepdim=True))


class GridAutoencoder(nn.Module):
    """(B, channels, H, W) <-> grid of codes (B, H / patch[0], W / patch[1] * codes_per_place).

    H and W are multiples of the patch; the patch's sides are even. The codes of one place stand side by side, so that
    vocabulary, documents and shards need not know how many there are.
    """

    def __init__(self, channels: int, patch: tuple[int, int], config: AutoencoderConfig):
        super().__init__()
        self.channels, self.patch, self.config = channels, patch, config
        self.quantizer = build_quantizer(config.quantizer)
        width, fine, dim = config.width, config.fine_width, self.quantizer.dim
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, patch, stride=patch),
            *(Block(width, config.encoder_kernel) for _ in range(config.encoder_blocks)),
            nn.GELU(), nn.Conv2d(width, dim, 1))
        half = (patch[0] // 2, patch[1] // 2)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            *([GlobalContext(width)] if config.global_context else []),
            *(Block(width, config.decoder_kernel) for _ in range(config.decoder_blocks)),
            nn.GELU(), nn.ConvTranspose2d(width, fine, 2, stride=2),
            *(Block(fine, 3) for _ in range(config.fine_blocks)),
            nn.GELU(), nn.ConvTranspose2d(fine, channels, half, stride=half))
        self.to(memory_format=torch.channels_last)

    @property
    def augments(self) -> bool:
        """Whether `augmented` alters anything: whether the section's `augment` has a probability above 0."""
        augment = getattr(self.config, "augment", None)
        return augment is not None and augment.probability > 0

    def augmented(self, source, rng):
        """See `MediaTokenizer`: here nothing is altered."""
        return source

    def latents(self, x: Tensor) -> Tensor:
        """(B, channels or more, H, W) -> (B, h, w, dim), before the quantizer."""
        x = x[:, : self.channels].contiguous(memory_format=torch.channels_last)
        return rearrange(self.encoder(x), "b c h w -> b h w c").float()

    def reconstruct(self, latents: Tensor) -> Tensor:
        """(B, h, w, dim) -> (B, channels, H, W)"""
        channels_first = rearrange(latents, "b h w c -> b c h w")
        return self.decoder(channels_first.contiguous(memory_format=torch.channels_last)).float()

    @torch.inference_mode()
    def encode(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> codes (B, h, w * codes_per_place) int64"""
        return rearrange(self.quantizer.encode(self.latents(x)), "b h w codes -> b h (w codes)")

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w * codes_per_place) -> (B, channels, H, W). Code 0 completes a last place that is not whole, as
        a model may write it: every grid has a picture."""
        per_place = self.quantizer.codes_per_place
        codes = F.pad(codes, (0, -codes.shape[-1] % per_place))
        places = rearrange(codes, "b h (w codes) -> b h w codes", codes=per_place)
        return self.reconstruct(self.quantizer.decode(places))

    def forward(self, x: Tensor, quantize: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (B, channels, H, W), or (B, 2 * channels, H, W) where the second half is to be made from the
        first (a denoising autoencoder, Vincent et al. 2008), and what to log. quantize=False trains a plain
        autoencoder, from whose latents k-means then starts the codebook."""
        latents = self.latents(x)
        if quantize:
            latents, codes, commitment = self.quantizer.quantize(latents)
        else:
            latents, commitment = self.quantizer.bypass(latents), latents.new_zeros(())
        error = self.reconstruct(latents) - x[:, -self.channels :]
        mse, mae = error.square().mean(), error.abs().mean()
        logs = {"mse": mse.detach()}
        if quantize:
            logs["codes_used"] = codes.unique().numel() / self.quantizer.codebook_size
        return mse + 0.1 * mae + commitment, logs
