"""Sounds as a modality. Their tokenizer is in audio_tokenizer.py, so that reading shards needs no torch."""

import numpy as np

from onevocab.tokenizers.media import AUDIO_SUFFIXES, audio_ending, encode_audio, load_audio
from onevocab.tokenizers.modality import Modality, Preview

PREVIEW_SECONDS = 10


def accepts(value) -> bool:
    """A pair (samples, rate)."""
    return (isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | np.integer) and value[1] > 0
            and not isinstance(value[1], bool))


def preview(sound: tuple[np.ndarray, int]) -> Preview:
    samples, rate = sound
    cut = f", the first {PREVIEW_SECONDS} s" if len(samples) > PREVIEW_SECONDS * rate else ""
    return Preview(f"{len(samples) / rate:.1f} s at {rate:,} Hz{cut}", "audio/wav",
                   encode_audio(np.nan_to_num(samples[: PREVIEW_SECONDS * rate]), rate, "WAV"))


MODALITY = Modality(
    name="audio", plural="sounds", sized=False,
    tokenizer_class="onevocab.tokenizers.audio_tokenizer:AudioTokenizer", value="a (samples, rate) pair",
    accepts=accepts, suffixes=AUDIO_SUFFIXES, shard_endings=("flac", "wav"), ending_of=audio_ending, load=load_audio,
    save=lambda sound: encode_audio(*sound, format="WAV"), to_shard=lambda sound: encode_audio(*sound), preview=preview,
    measure=lambda sound: ("seconds of a sound", len(sound[0]) / sound[1]),
    describe=("What do you hear?", "Describe the sound.", "What is this sound?", "Put this sound into words."),
    make=("Let me hear {caption}", "Make this sound: {caption}", "A sound, please: {caption}",
          "Say or play: {caption}"))
