"""A complete small run folder with random weights: everything that sampling needs, in a second and
without training."""

from pathlib import Path

import torch

from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.tokenizers.audio_tokenizer import AudioConfig, AudioTokenizer
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.image_tokenizer import ImageConfig, ImageTokenizer
from onevocab.tokenizers.text import TextConfig, TextTokenizer
from onevocab.tokenizers.vocabulary import Vocabulary
from onevocab.training import checkpoint

SMALL = {"width": 8, "fine_width": 8, "encoder_blocks": 0, "decoder_blocks": 0, "fine_blocks": 0}
TEXT = ["a red apple on a green field", "what is in the picture? é 漢字", "draw a blue dog 0123456789"]


def tiny_tokenizers(seed: int = 0, codes: int = 16) -> Tokenizers:
    """16x16 pictures of 4x4 codes, sounds of 2 codes a column and at most a second."""
    torch.manual_seed(seed)
    quantizer = {"codebook_size": codes, "dim": 4}
    image = ImageTokenizer(ImageConfig(size=(16, 16), patch=4, max_side=8, quantizer=quantizer, **SMALL))
    audio = AudioTokenizer(AudioConfig(mels=16, rows=2, max_seconds=1.0, quantizer=quantizer, **SMALL))
    text = TextTokenizer.train(TEXT, TextConfig(vocab_size=290))
    return Tokenizers(text, {"image": image.eval(), "audio": audio.eval()})


def tiny_decoder(vocab: Vocabulary, seed: int = 0, max_length: int = 160) -> Decoder:
    """Random, but with opinions: its head is larger than at the start of a training, so that choices
    differ."""
    torch.manual_seed(seed)
    config = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, max_length=max_length)
    model = Decoder(config, vocab.size)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(15)
        for layer in model.layers:
            layer.self_attn.o_proj.weight.mul_(8)
            layer.mlp.down_proj.weight.mul_(8)
    return model.eval()


def tiny_run(folder: Path, stages=("instruct",), max_length: int = 160) -> Path:
    """Writes a run folder with these stages' checkpoints and returns it."""
    tokenizers = tiny_tokenizers()
    tokenizers.save(folder / "tokenizers")
    for seed, stage in enumerate(stages):
        save_step(folder / stage, 10, tokenizers.vocab, seed, max_length)
    return folder


def save_step(folder: Path, step: int, vocab: Vocabulary, seed: int = 0, max_length: int = 160) -> Path:
    """FOLDER/step-N of a random model, as training writes it."""
    model = tiny_decoder(vocab, seed, max_length)
    info = {"config": model.config.model_dump(), "vocab_size": vocab.size, "vocabulary": vocab.hash}
    return checkpoint.save(folder, step, model, info, None, {})
