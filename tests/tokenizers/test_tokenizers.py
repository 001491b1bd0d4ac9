"""Vocabulary, documents, quantizers, media: round trips, published peers, and what strangers may send."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from onevocab.common.errors import UserError, invalid
from onevocab.tokenizers.audio_tokenizer import AudioConfig, AudioTokenizer
from onevocab.tokenizers.autoencoder import AutoencoderConfig, GridAutoencoder
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.document import Document, Segment, conversation, decode_document, encode_document
from onevocab.tokenizers.image_tokenizer import ImageConfig, ImageTokenizer
from onevocab.tokenizers.media import RATE, encode_audio, encode_png, load_audio, load_image
from onevocab.tokenizers.quantizers import CLASSES, QUANTIZERS
from onevocab.tokenizers.quantizers.base import Quantizer
from onevocab.tokenizers.quantizers.fsq import FiniteScalarQuantizer, FSQConfig
from onevocab.tokenizers.quantizers.vq import VectorQuantizer, VQConfig
from onevocab.tokenizers.sound import MARGIN
from onevocab.tokenizers.text import TextConfig, TextTokenizer
from onevocab.tokenizers.torchaudio_guard import torchaudio
from onevocab.tokenizers.vocabulary import SPARE, SPECIALS, Vocabulary, special_spelling

TEXT = TextTokenizer.train(["a dog and a cat on a blue background, 12 34"] * 30, TextConfig(vocab_size=300))
VOCAB = Vocabulary.build(TEXT.size, [
    {"name": "image", "sizes": 8, "codes": 50, "rows": 0}, {"name": "audio", "sizes": 0, "codes": 30, "rows": 2}])


# ------------------------------------------------------------------------------------------------ vocabulary


def test_ranges_are_contiguous_and_do_not_overlap():
    image, audio = VOCAB.spans["image"], VOCAB.spans["audio"]
    assert image.start == TEXT.size + len(SPECIALS) + SPARE
    assert audio.start == image.stop and VOCAB.size == audio.stop
    ids = [image.begin, image.end, *(image.size_id(n) for n in range(1, 9)), *range(image.codes_start, image.stop)]
    assert sorted(ids) == list(range(image.start, image.stop))
    assert audio.end == audio.codes_start + audio.codes, "audio's end stands beside its codes"
    assert VOCAB.end_of_turn == TEXT.size, "text and end_of_turn are one slice"
    edges = np.array([0, VOCAB.pad, image.begin, image.stop - 1, audio.begin])
    assert list(VOCAB.modality_of(edges)) == [0, 0, 1, 1, 2]


def test_vocabulary_survives_json_and_knows_its_prefixes():
    assert Vocabulary.from_json(VOCAB.to_json()) == VOCAB
    larger = Vocabulary.build(TEXT.size, [{"name": r.name, "sizes": r.sizes, "codes": r.codes, "rows": r.rows}
                                          for r in VOCAB.ranges] + [{"name": "x", "sizes": 0, "codes": 3, "rows": 1}])
    assert VOCAB.is_prefix_of(larger) and not larger.is_prefix_of(VOCAB)
    assert larger.hash != VOCAB.hash
    with pytest.raises(UserError, match="broken"):
        Vocabulary.from_json({"text_size": 3})


# ------------------------------------------------------------------------------------------------ documents

texts = st.text(st.characters(codec="utf-8"), max_size=20)
images = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(st.integers(0, 49), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda codes: np.array(codes).reshape(shape)))
sounds = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.integers(0, 29), min_size=2 * n, max_size=2 * n).map(lambda c: np.array(c).reshape(n, 2)))
parts = st.one_of(st.tuples(st.just("text"), texts), st.tuples(st.just("image"), images),
                  st.tuples(st.just("audio"), sounds))


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, min_size=1, max_size=5))
def test_plain_documents_come_back(content):
    document = Document(tuple(Segment(*part) for part in content)).normalised()
    encoded = encode_document(document, VOCAB, TEXT.encode)
    assert decode_document(encoded.ids, VOCAB, TEXT.decode) == document
    assert encoded.ids.dtype == np.int32 and encoded.ids.max() < VOCAB.size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.lists(parts, max_size=3)), min_size=1,
                max_size=5))
def test_conversations_come_back_and_loss_falls_on_the_assistant(messages):
    document = conversation(messages).normalised()
    encoded = encode_document(document, VOCAB, TEXT.encode)
    assert decode_document(encoded.ids, VOCAB, TEXT.decode) == document
    expected = sum(len(encode_document(Document((replace(segment, role=None),)), VOCAB, TEXT.encode).ids) - 2
                   for segment in document.segments if segment.role == "assistant")
    turns = len({segment.turn for segment in document.segments if segment.role == "assistant"})
    assert encoded.loss_mask.sum() == expected + turns, "the assistant's content and its end_of_turn, nothing else"


def test_a_prompt_is_the_beginning_of_its_training_row():
    asked = [("user", [("text", "what?"), ("image", np.zeros((2, 2), int))])]
    prompt = encode_document(conversation(asked), VOCAB, TEXT.encode, open_role="assistant").ids
    row = encode_document(conversation([*asked, ("assistant", [("text", "a dog")])]), VOCAB, TEXT.encode).ids
    assert np.array_equal(row[: len(prompt)], prompt)


def test_special_spellings_in_text_are_only_text():
    spelled = "".join(special_spelling(name) for name in SPECIALS)
    assert max(TEXT.encode(spelled)) < TEXT.size
    assert TEXT.decode(TEXT.encode(spelled)) == spelled


def test_broken_spans_are_refused():
    image = VOCAB.spans["image"]
    good = image.wrap(np.zeros((2, 3), int))
    for bad in (good[:-1], np.delete(good, 4), np.insert(good, 4, image.codes_start)):
        with pytest.raises(ValueError):
            image.unwrap(bad)
    with pytest.raises(UserError, match="0..49"):
        image.wrap(np.full((2, 2), 50))
    with pytest.raises(UserError, match="sizes are 1 to 8"):
        image.wrap(np.zeros((9, 1), int))


def test_text_of_any_kind_comes_back():
    for text in ("", "äöü 漢字 🐶", "x" * 50_000, " " * 200_000, "a\ud800b".encode("utf-8", "replace").decode()):
        assert TEXT.decode(TEXT.encode(text)) == text
    assert TEXT.decode(TEXT.encode("a\ud800b")) == "a?b"
    digits = [TEXT.decode([token]).strip() for token in TEXT.encode("12 34")]
    assert digits == ["1", "2", "3", "4"]


# ------------------------------------------------------------------------------------------------ quantizers


def test_fsq_equals_the_published_implementation():
    peer = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=[8, 5, 5, 4], preserve_symmetry=False)
    ours = FiniteScalarQuantizer(FSQConfig(levels=(8, 5, 5, 4)))
    z = torch.randn(3, 7, 4) * 2
    theirs, their_codes = peer(z)
    quantized, codes, _ = ours.quantize(z)
    assert torch.equal(codes, their_codes.long()[..., None])
    torch.testing.assert_close(quantized, theirs)
    torch.testing.assert_close(ours.decode(codes), peer.indices_to_codes(their_codes))


def test_vq_assigns_like_the_published_implementation():
    library = pytest.importorskip("vector_quantize_pytorch")
    peer = library.VectorQuantize(dim=8, codebook_size=32, use_cosine_sim=True).eval()
    ours = VectorQuantizer(VQConfig(codebook_size=32, dim=8))
    ours.codebook.copy_(peer.codebook)
    z = torch.randn(5, 20, 8)
    assert torch.equal(ours.encode(z), peer(z)[1][..., None])


def test_vq_learns_clusters_restarts_dead_codes_and_passes_gradients():
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(16, 8), dim=-1)
    quantizer = VectorQuantizer(VQConfig(codebook_size=32, dim=8, decay=0.9)).train()

    def draw():
        return torch.nn.functional.normalize(centres[torch.randint(16, (512,))] + 0.02 * torch.randn(512, 8), dim=-1)

    quantizer.codebook[:] = centres[0]  # all but one code is dead
    quantizer.sums[:] = centres[0]
    for _ in range(150):
        quantizer.quantize(draw())
    z = draw()
    nearest = quantizer.decode(quantizer.encode(z))
    assert (z * nearest).sum(-1).mean() > 0.98, "the noise leaves 0.997; one code for all leaves 0.1"
    z = draw().requires_grad_()
    quantizer.quantize(z)[0].sum().backward()
    assert z.grad.abs().sum() > 0


def test_a_quantizers_kind_says_which_settings_there_are():
    def read(quantizer):
        return ImageConfig.model_validate({"quantizer": quantizer}).quantizer

    assert ImageConfig().quantizer == read({}) == VQConfig()
    assert read({"codebook_size": 64}) == VQConfig(codebook_size=64)
    assert read({"kind": "fsq", "levels": [4, 4]}) == FSQConfig(levels=(4, 4))
    assert set(QUANTIZERS) == {"vq", "fsq"} and all(cls.Config().kind == kind for kind, cls in CLASSES.items())
    for wrong, message in (({"kind": "fsq", "codebook_size": 64}, "fsq.codebook_size: unknown key"),
                           ({"levels": [4, 4]}, "vq.levels: unknown key"), ({"kind": "lfq"}, "'vq', 'fsq'")):
        with pytest.raises(ValidationError) as raised:
            read(wrong)
        assert message in str(invalid(raised.value, "x.toml"))


class Digits(Quantizer):
    """Two codes a place: the digits of round(z) to base 10."""

    dim, codebook_size, codes_per_place = 1, 10, 2

    def encode(self, z):
        return torch.cat([z.round().long() // 10, z.round().long() % 10], -1)

    def decode(self, codes):
        return (codes[..., :1] * 10 + codes[..., 1:]).float()


def test_the_codes_of_a_place_stand_side_by_side():
    model = GridAutoencoder(1, (2, 2), AutoencoderConfig(quantizer=FSQConfig(levels=(4,))))
    model.quantizer, model.encoder, model.decoder = Digits(), torch.nn.AvgPool2d(2), torch.nn.Upsample(scale_factor=2)
    x = torch.tensor([[12.0, 34.0, 56.0], [78.0, 90.0, 1.0]])
    codes = model.encode(x.repeat_interleave(2, 0).repeat_interleave(2, 1)[None, None])
    assert codes.tolist() == [[[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 1]]]
    assert torch.equal(model.decode(codes)[0, 0, ::2, ::2], x)
    assert model.decode(codes[..., :3])[0, 0, ::2, ::2].tolist() == [[12, 30], [78, 90]], "0 completes the last place"


# ------------------------------------------------------------------------------------------------ media tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Tokenizers:
    torch.manual_seed(0)
    small = {"width": 16, "fine_width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "fine_blocks": 1}
    image = ImageTokenizer(ImageConfig(**small, quantizer=VQConfig(codebook_size=64, dim=8))).eval()
    audio = AudioTokenizer(AudioConfig(**small, quantizer=FSQConfig(levels=(4, 4, 4)))).eval()
    bundle = Tokenizers(TEXT, {"image": image, "audio": audio})
    bundle.save(tmp_path_factory.mktemp("tokenizers"))
    return bundle


def test_saved_tokenizers_give_the_same_codes(tokenizers, tmp_path):
    tokenizers.save(tmp_path)
    loaded = Tokenizers.load(tmp_path)
    assert loaded.hash == tokenizers.hash and loaded.vocab == tokenizers.vocab
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    sound = (np.random.default_rng(0).normal(0, 0.1, 9000).astype(np.float32), RATE)
    for name, source in (("image", picture), ("audio", sound)):
        assert np.array_equal(loaded.encode_media(name, source), tokenizers.encode_media(name, source))
    (tmp_path / "image.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="image"):
        Tokenizers.load(tmp_path)


def test_a_patch_has_the_same_code_wherever_it_stands(tokenizers):
    patch = np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8)
    codes = tokenizers.encode_media("image", Image.fromarray(np.tile(patch, (8, 8, 1))))
    assert codes.shape == (8, 8) and len(np.unique(codes)) == 1


def test_sound_keeps_its_length_in_whole_columns(tokenizers):
    audio = tokenizers.media["audio"]
    for samples in (2, 1023, 1024, 1025, 16_000):
        swing = np.resize(np.array([0.1, -0.1], np.float32), samples)  # a constant would be an offset
        codes = tokenizers.encode_media("audio", (swing, RATE))
        margins = 2 * round(MARGIN * RATE)  # silence, which every prepared sound has
        assert codes.shape == (-(-(samples + margins) // 1024), audio.config.rows)
        sound, rate = tokenizers.decode_media("audio", codes)
        assert rate == RATE and abs(len(sound) - len(codes) * 1024) <= 256


def test_mel_is_torchaudios_definition_and_griffin_lim_inverts_it(tokenizers):
    audio = tokenizers.media["audio"]
    time = np.arange(16_384) / RATE
    tone = (0.4 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    mel = audio.log_mel(tone)
    assert mel.shape == (1, 64, 64)
    invert = torchaudio.transforms.InverseMelScale(513, 64, RATE, norm="slaney", mel_scale="slaney")
    peer = audio.vocode(invert(audio.spectrogram(torch.from_numpy(tone)))).numpy()

    def error(samples):
        again = audio.log_mel(samples[:16_384]).exp()
        return (again - mel.exp())[..., 4:-4].norm() / mel.exp()[..., 4:-4].norm()

    assert error(audio.to_waveform(mel)) < 1.1 * error(peer), "no worse than torchaudio's own inverse"
    spectrum = np.abs(np.fft.rfft(audio.to_waveform(mel)[4096:12_288]))
    assert abs(np.argmax(spectrum) * RATE / 8192 - 440) < 20


def test_any_rate_and_stereo_are_brought_to_16_khz_mono(tokenizers):
    tone = np.sin(2 * np.pi * 300 * np.arange(44_100) / 44_100).astype(np.float32)
    assert abs(len(tokenizers.media["audio"].mono((tone, 44_100))) - RATE) <= 1
    assert tokenizers.media["audio"].read((np.stack([tone, tone], axis=1), 44_100)).ndim == 1
    with pytest.raises(UserError, match="longer than"):
        tokenizers.media["audio"].read((np.zeros(RATE * 9, np.float32), RATE))


# ------------------------------------------------------------------------------------------------ files of strangers


def test_media_files_are_checked_before_they_are_decoded(tmp_path):
    huge = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_000)).save(huge)
    with pytest.raises(UserError, match="10000x10000"):
        load_image(huge)
    for content in (b"", b"\x89PNG\r\n\x1a\n", encode_png(Image.new("RGB", (9, 9)))[:40]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match="bad.png"):
            load_image(tmp_path / "bad.png")
    with pytest.raises(UserError, match="no such file"):
        load_image(tmp_path / "none.png")
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), RATE, format="WAV")
    with pytest.raises(UserError, match="no sound"):
        load_audio(empty.getvalue())
    long = encode_audio(np.zeros(RATE * 3), RATE)
    with pytest.raises(UserError, match="allowed"):
        load_audio(long, max_seconds=2)
    with pytest.raises(UserError, match="cannot read"):
        load_audio(b"RIFFjunk")


def test_transparent_pictures_are_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(encode_png(clear)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("broken", [False, True])
def test_torchaudio_imports_with_and_without_its_native_part(broken):
    block = ("import importlib.abc, sys\n"
             "class Block(importlib.abc.MetaPathFinder):\n"
             "    def find_spec(self, name, path, target=None):\n"
             "        if name == 'torchaudio._extension': raise OSError('broken')\n"
             "sys.meta_path.insert(0, Block())\n") if broken else ""
    code = block + ("from onevocab.tokenizers.torchaudio_guard import torchaudio\nimport torch\n"
                    "print(torchaudio.transforms.MelSpectrogram()(torch.zeros(16000)).shape[0])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "128", done.stderr
