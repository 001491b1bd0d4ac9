"""One preparation of sounds: what Python and files hand over, loudness, silence, augmentation."""

import io

import numpy as np
import pytest
import soundfile
import torch

from onevocab.common.errors import UserError
from onevocab.tokenizers.audio_augment import AudioAugment, augment
from onevocab.tokenizers.audio_tokenizer import AudioConfig, AudioTokenizer
from onevocab.tokenizers.media import RATE, encode_audio, load_audio
from onevocab.tokenizers.sound import LOUDNESS, MARGIN, prepare, to_mono


def word(seed: int = 0, seconds: float = 0.6) -> np.ndarray:
    """Noise that swells and fades, float32 at 16 kHz."""
    count = int(seconds * RATE)
    return (np.random.default_rng(seed).normal(0, 0.2, count) * np.hanning(count)).astype(np.float32)


@pytest.mark.parametrize("samples", [
    (word() * 32768).astype(np.int16), (word() * 2**31).astype(np.int32),
    ((word() * 128) + 128).round().clip(0, 255).astype(np.uint8), word().astype(np.float64),
    np.stack([word(), word()], 1), np.stack([word(), word()]), torch.from_numpy(word())[None], word() * 20_000,
], ids=["int16", "int32", "uint8", "float64", "n x channels", "channels x n", "torch", "beyond full scale"])
def test_whatever_numbers_a_sound_comes_in_it_is_the_same_sound(samples):
    """soundfile gives (n, channels), torchaudio (channels, n), wave files integers."""
    mono = to_mono(samples)
    assert mono.shape == word().shape and mono.dtype == np.float32 and np.abs(mono).max() <= 1
    assert np.corrcoef(mono, word())[0, 1] > 0.99
    assert np.abs(prepare(mono, RATE, trim=False) - prepare(word(), RATE, trim=False)).max() < 0.02


@pytest.mark.parametrize("samples", [
    [0.1, 0.2], np.array([1, 2]), np.array([True]), np.array(["a"]), np.zeros(0), np.zeros((0, 2)), np.zeros((9, 20)),
    np.zeros((4, 4)), np.zeros((1, 2, 3)), np.array([0, np.nan]), np.array([0, np.inf]), np.zeros(4, np.complex64),
    None])
def test_what_is_no_sound_is_refused(samples):
    with pytest.raises(UserError, match="sound"):
        to_mono(samples)


def test_channels_that_cancel_each_other_out_are_still_heard():
    assert np.abs(to_mono(np.stack([word(), -word()]))).max() > 0.1


def test_a_float_file_beyond_full_scale_is_the_same_sound():
    file = io.BytesIO()
    soundfile.write(file, word() * 20_000, RATE, format="WAV", subtype="FLOAT")
    samples, _ = load_audio(file.getvalue())
    assert np.abs(samples).max() <= 1 and np.corrcoef(samples, word())[0, 1] > 0.999


@pytest.mark.parametrize("fades", [True, False], ids=["fading", "cut"])
@pytest.mark.parametrize("before, after, gain", [(0, 0, 0.1), (0.2, 0.2, 1), (2, 0, 3), (0.0371, 1, 0.01)])
def test_silence_and_loudness_change_nothing(before, after, gain, fades):
    sound = word() if fades else np.random.default_rng(0).normal(0, 0.2, 9000).astype(np.float32)
    clip = np.pad(sound * np.float32(gain), (int(before * RATE), int(after * RATE)))
    one, other = prepare(sound, RATE), prepare(clip, RATE)
    assert one.shape == other.shape and np.abs(one - other).max() < 1e-5


def test_prepared_sounds_have_the_stated_loudness_and_margins():
    tone = np.sin(np.arange(RATE) / 5).astype(np.float32) * 0.03
    sound = prepare(np.pad(tone, RATE), RATE)
    assert abs(20 * np.log10(sound[RATE // 2 :][:2000].std()) - LOUDNESS) < 0.5
    assert len(sound) == pytest.approx(RATE * (1 + 2 * MARGIN), abs=0.03 * RATE)
    quiet = prepare(np.zeros(RATE, np.float32), RATE)
    assert len(quiet) == RATE and not quiet.any(), "nothing is made out of nothing"


def test_the_tokenizer_prepares_and_can_be_told_not_to():
    clip = np.pad(word(), RATE // 2)
    assert len(AudioTokenizer(AudioConfig()).read((clip, RATE))) < RATE
    as_it_is = AudioTokenizer(AudioConfig(loudness=False, trim=False))
    assert np.array_equal(as_it_is.read((clip, RATE)), clip)


def test_silence_does_not_count_as_length():
    long = np.pad(word(seconds=7), 3 * RATE)
    assert len(AudioTokenizer(AudioConfig(max_seconds=8)).read((long, RATE))) < 8 * RATE


@pytest.mark.parametrize("seconds", [0.95, 1.0])
def test_a_sound_of_the_longest_length_is_heard_altered_or_not(seconds):
    """Its margins of silence give way, not the sound."""
    clip = np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    tokenizer = AudioTokenizer(AudioConfig(max_seconds=1.0, augment=AudioAugment(probability=1.0)))
    assert len(tokenizer.read((clip, RATE))) == RATE
    for seed in range(12):
        assert len(tokenizer.read(tokenizer.augmented((clip, RATE), np.random.default_rng(seed)))) <= RATE
        silent = np.pad(clip[: RATE // 2], RATE), RATE  # too long only by what is cut
        assert len(tokenizer.read(tokenizer.augmented(silent, np.random.default_rng(seed)))) <= RATE
    with pytest.raises(UserError, match="longer than"):
        tokenizer.read((np.tile(clip, 2), RATE))


def test_augmentation_keeps_the_sound_and_its_length_within_the_limit():
    config = AudioAugment(probability=1.0)
    for seed in range(40):
        clip = word(seed)
        altered = augment(clip, RATE, config, np.random.default_rng(seed), longest=0.8)
        assert altered.dtype == np.float32 and np.isfinite(altered).all() and np.abs(altered).max() < 3
        assert len(altered) <= 0.8 * RATE
        assert np.array_equal(altered, augment(clip, RATE, config, np.random.default_rng(seed), longest=0.8))
    lengths = {len(augment(clip, RATE, config, np.random.default_rng(seed), longest=2)) for seed in range(20)}
    assert len(lengths) > 5


def test_the_tokenizer_learns_to_make_the_clean_sound_from_the_altered_one():
    """Both in the same places; without `denoise` both are the same, whatever the model hears in training."""
    files = [encode_audio(word(seed, 0.5), RATE) for seed in range(12)]
    plain = AudioTokenizer(AudioConfig(augment=AudioAugment(probability=1.0))).training_set(files)
    assert plain.shape[:2] == (12, 2) and torch.equal(plain[:, 0], plain[:, 1])
    tokenizer = AudioTokenizer(AudioConfig(denoise=1.0))
    heard, clean = tokenizer.training_set(files).unbind(1)
    assert torch.equal(clean, plain[:, 1]) and (heard != clean).flatten(1).any(1).sum() > 8
    assert np.corrcoef(heard.flatten(), clean.flatten())[0, 1] > 0.7
    x = tokenizer.batch(torch.stack([heard, clean], 1))
    loss, logs = tokenizer(x, False)
    error = tokenizer.reconstruct(tokenizer.quantizer.bypass(tokenizer.latents(x))) - x[:, 1:]
    assert logs["mse"].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_without_probability_nothing_is_altered():
    assert not AudioTokenizer(AudioConfig()).augments
    tokenizer = AudioTokenizer(AudioConfig(augment=AudioAugment(probability=0.5)))
    source = word(), RATE
    same = [tokenizer.augmented(source, np.random.default_rng(seed)) is source for seed in range(200)]
    assert tokenizer.augments and 0.4 < np.mean(same) < 0.6


@pytest.mark.parametrize("offset", [0.3, -0.05])
def test_a_constant_offset_is_not_heard(offset):
    """Cheap converters add one: it is neither loud nor a sound that keeps silence from being cut."""
    clip = np.pad(word() * np.float32(0.2), RATE)
    assert abs(len(prepare(clip + np.float32(offset), RATE)) - len(prepare(clip, RATE))) < 0.001 * RATE
    whole = prepare(clip + np.float32(offset), RATE, trim=False)
    assert np.abs(whole - prepare(clip, RATE, trim=False)).max() < 0.02


def wav(**size: int) -> bytes:
    """A WAV of a second whose header gives another size of the file, and of what it holds."""
    content = bytearray(encode_audio(word(seconds=1), RATE, "WAV"))
    start = content.index(b"data") + 4
    content[4:8] = size["file"].to_bytes(4, "little")
    content[start : start + 4] = size["data"].to_bytes(4, "little")
    return bytes(content)


def mp3(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="MP3")
    return file.getvalue()


@pytest.mark.parametrize("content", [
    encode_audio(word(seconds=1), RATE, "WAV")[:-8000], wav(file=2 << 20, data=(2 << 20) - 36),
    encode_audio(word(seconds=1), RATE, "FLAC")[:-4000], mp3(word(seconds=1))[:-2000],
], ids=["wav", "wav by its header", "flac", "mp3"])
def test_a_sound_that_is_cut_short_is_refused(content):
    with pytest.raises(UserError, match="cut short|cannot read"):
        load_audio(content)


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_F024, 32_044], ids=["ffmpeg", "sox", "miscounted"])
def test_a_wav_that_was_written_as_a_stream_is_whole(size):
    samples, _ = load_audio(wav(file=size, data=max(size - 36, 32_000)))
    assert len(samples) == RATE


def test_sounds_in_which_nothing_is_heard_teach_no_tokenizer():
    """Their deviation is nothing, and what is divided by it no number."""
    tokenizer, silence = AudioTokenizer(AudioConfig()), encode_audio(np.zeros(RATE), RATE)
    with pytest.raises(UserError, match="anything to be heard"):
        tokenizer.batch(tokenizer.training_set([silence]))
    assert tokenizer.batch(tokenizer.training_set([silence, encode_audio(word(), RATE)])).isfinite().all()
