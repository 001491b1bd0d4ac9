"""Sounds <-> columns of codes: log-mel spectrogram, grid of codes, and back through Griffin-Lim."""

import zlib
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import torch
from pydantic import Field

from onevocab.common.errors import UserError
from onevocab.tokenizers import sound
from onevocab.tokenizers.audio_augment import AudioAugment, augment
from onevocab.tokenizers.autoencoder import AutoencoderConfig, GridAutoencoder
from onevocab.tokenizers.media import MAX_SECONDS, RATE, load_audio
from onevocab.tokenizers.torchaudio_guard import torchaudio

FFT, HOP = 1024, 256
SILENT = 1e-3  # deviation of log-mels below which nothing is to be heard: speech has about 1
FLOOR = 5e-3  # some 45 dB below a loud vowel: codes are not spent on what nobody hears
PHASE_ITERATIONS = 32


class AudioConfig(AutoencoderConfig):
    """[audio]: the tokenizer of sounds."""

    mels: int = Field(64, ge=8, le=256, description="frequency bins of the spectrogram")
    rows: int = Field(2, ge=1, description="codes of a column")
    column_frames: int = Field(4, ge=4, multiple_of=2, description="spectrogram frames of 16 ms that a column covers")
    max_seconds: float = Field(8.0, gt=0, le=MAX_SECONDS, description="longest sound that is encoded")
    loudness: bool = Field(True, description="sounds are brought to one loudness, in training and in prompts")
    trim: bool = Field(True, description="silence at both ends is cut, in training and in prompts")
    clip_seconds: float = Field(0.768, gt=0, description="length of the pieces that the tokenizer trains on")
    steps: int = Field(1500, ge=1, description="training steps of the tokenizer")
    batch_size: int = Field(32, ge=1, description="pieces a step, over all ranks")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW's, for vectors; Muon's, for matrices, is five "
                                 "times as high")
    augment: AudioAugment = AudioAugment()
    denoise: float = Field(0.0, ge=0, le=1, description="share of the pieces that the tokenizer learns to make from "
                           "altered ones, as [audio.augment] alters them: equal words then get equal codes through "
                           "noise, at some cost to what is made from them")


class AudioTokenizer(GridAutoencoder):
    """Mono sound at any rate -> codes [columns, rows]; codes -> float32 at 16 kHz.

    The spectrogram is ln(magnitude mel + FLOOR), Slaney's scale, standardised by the training set's mean and
    deviation. Rows run from low to high frequency.
    """

    name = "audio"
    Config = AudioConfig

    def __init__(self, config: AudioConfig):
        if config.mels % config.rows or config.mels // config.rows % 2:
            raise UserError(f"[audio] rows = {config.rows} must divide mels = {config.mels} into even parts")
        super().__init__(1, (config.mels // config.rows, config.column_frames), config)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.silent = False  # all of the training set
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            RATE, FFT, hop_length=HOP, n_mels=config.mels, power=1.0, norm="slaney", mel_scale="slaney")
        self.vocode = torchaudio.transforms.GriffinLim(FFT, PHASE_ITERATIONS, hop_length=HOP, power=1.0,
                                                       momentum=0.99, rand_init=False)
        # Least squares through the pseudo-inverse: the judge hears no difference from NNLS at a tenth of its time.
        self.register_buffer("inverse_mel", torch.linalg.pinv(self.spectrogram.mel_scale.fb), persistent=False)

    @property
    def layout(self) -> dict:
        """What the vocabulary needs to know: see `Vocabulary.build`."""
        return {"name": self.name, "sizes": 0, "codes": self.quantizer.codebook_size, "rows": self.config.rows}

    @property
    def columns_per_second(self) -> float:
        """Columns of codes: of several codes a place each is a column of its own."""
        return RATE / HOP / self.config.column_frames * self.quantizer.codes_per_place

    def mono(self, source) -> np.ndarray:
        """(samples, rate), path or bytes -> float32 mono (n,) at 16 kHz. Raises UserError as `sound.to_mono` does, and
        on an impossible rate or length."""
        samples, rate = source if isinstance(source, tuple) else load_audio(source)
        samples = sound.to_mono(samples)
        if not 1_000 <= rate <= 768_000:
            raise UserError(f"a sound of {rate} samples a second is not understood; bring it to 16 kHz")
        if len(samples) > MAX_SECONDS * rate:
            raise UserError(f"a sound of {len(samples) / rate:.0f} s is longer than the {MAX_SECONDS:.0f} s allowed; "
                            "cut it")
        rate = round(rate / 50) * 50  # a kernel for 44,101 Hz would take gigabytes; 0.1% of pitch is not heard
        if rate != RATE:
            samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()
        return samples

    def read(self, source) -> np.ndarray:
        """What `mono` takes -> float32 (n,) at 16 kHz, prepared as [audio] says (`sound.prepare`), at most
        `max_seconds` long. Raises UserError on a sound that cannot be used."""
        return self._prepared(self.mono(source))

    def _prepared(self, samples: np.ndarray) -> np.ndarray:
        longest = int(self.config.max_seconds * RATE)
        samples = sound.prepare(samples, RATE, self.config.loudness, self.config.trim, longest)
        if len(samples) > longest:
            raise UserError(f"a sound of {len(samples) / RATE:.1f} s is longer than the {self.config.max_seconds} s "
                            "this model hears at once; cut it")
        return samples

    def augmented(self, source, rng: np.random.Generator):
        """A sound as it is to be heard in training: altered, for a share of them, by [audio.augment]."""
        if rng.random() >= self.config.augment.probability:
            return source
        samples = self.mono(source)
        if len(samples) > self.config.max_seconds * RATE:  # by its silence, which noise would turn into sound
            samples = self._prepared(samples)
        return augment(samples, RATE, self.config.augment, rng, self.config.max_seconds), RATE

    @torch.inference_mode()
    def log_mel(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (n,) at 16 kHz -> (1, mels, frames), frames a multiple of a column, not yet standardised."""
        hop = HOP * self.config.column_frames
        samples = torch.from_numpy(samples).to(self.mean.device)
        length = max(1, -(-len(samples) // hop)) * hop
        # The last frame of a centred transform stands past the end: dropped, so that n hops give n frames.
        mel = self.spectrogram(torch.nn.functional.pad(samples, (0, length - len(samples))))[..., :-1]
        return (mel + FLOOR).log()[None]

    @property
    def max_grid(self) -> tuple[int, int]:
        """Columns and rows of codes of the longest sound."""
        return int(self.config.max_seconds * self.columns_per_second), self.config.rows

    def training_set(self, files: Iterable[bytes]) -> torch.Tensor:
        """Files -> log-mel pieces of `clip_seconds`, float (n, 2, mels, frames): each as it is heard, altered in
        `denoise` of them, and as it is. The mean and deviation of the latter then standardise every sound. Equal files
        count once, unreadable ones are left out; short sounds are padded with silence, of long ones each piece is
        taken."""
        columns = max(1, round(self.config.clip_seconds * RATE / HOP / self.config.column_frames))
        length, pieces = columns * self.config.column_frames * HOP, []
        for content in dict.fromkeys(files):
            with suppress(UserError):
                samples = self.read(content)
                for start in range(0, len(samples), length):
                    piece = samples[start : start + length]
                    heard = self._altered_in_place(piece, np.random.default_rng([zlib.crc32(content), start]))
                    pieces.append(torch.cat([self.log_mel(np.pad(one, (0, length - len(piece))))
                                             for one in (heard, piece)]))
        if not pieces:
            return torch.empty(0)
        mels = torch.stack(pieces).clone()
        self.mean.fill_(mels[:, 1].mean())
        self.deviation.fill_(mels[:, 1].std())
        self.silent = float(self.deviation) < SILENT
        return mels

    def _altered_in_place(self, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A prepared sound, or for `denoise` of them the same as [audio.augment] alters it, of the same length and in
        the same places."""
        if rng.random() >= self.config.denoise:
            return samples
        return sound.prepare(augment(samples, RATE, self.config.augment, rng), RATE, self.config.loudness, trim=False)

    def batch(self, mels: torch.Tensor) -> torch.Tensor:
        """Log-mels (B, 2, mels, frames), standardised. Raises UserError where the whole training set is silent."""
        if self.silent:
            raise UserError("[audio]: in none of the sounds of the data is anything to be heard; mend them, or take "
                            "them out")
        return self.standardise(mels)

    def standardise(self, mel: torch.Tensor) -> torch.Tensor:
        return (mel - self.mean) / self.deviation

    def encode_batch(self, sources: list) -> list[np.ndarray]:
        """Sounds (see `read`) -> codes [columns, rows] each. Sounds of one length are encoded together."""
        mels = [self.log_mel(self.read(source)) for source in sources]
        codes: list = [None] * len(mels)
        by_length: dict[int, list[int]] = {}
        for i, mel in enumerate(mels):
            by_length.setdefault(mel.shape[-1], []).append(i)
        for indices in by_length.values():
            grids = self.encode(self.standardise(torch.stack([mels[i] for i in indices])))
            for i, grid in zip(indices, grids.cpu().numpy(), strict=True):
                codes[i] = grid.T  # [rows, columns] of the spectrogram -> column by column in time
        return codes

    @torch.inference_mode()
    def to_waveform(self, mel: torch.Tensor) -> np.ndarray:
        """(1, mels, frames) log-mel -> float32 (frames * hop,) by Griffin & Lim 1984, with Perraudin's momentum."""
        magnitude = (self.inverse_mel.T @ (mel[0].exp() - FLOOR)).clamp_min(0)
        magnitude = torch.cat([magnitude, magnitude[:, -1:]], dim=1)  # the frame dropped in `log_mel`
        return self.vocode(magnitude).cpu().numpy()

    def decode_batch(self, grids: list[np.ndarray]) -> list[tuple[np.ndarray, int]]:
        """Codes [columns, rows] each -> (float32 (n,), 16000)."""
        sounds = []
        for grid in grids:
            codes = torch.from_numpy(np.asarray(grid, np.int64).T.copy()).to(self.mean.device)
            mel = self.decode(codes[None])[0] * self.deviation + self.mean
            sounds.append((self.to_waveform(mel), RATE))
        return sounds
