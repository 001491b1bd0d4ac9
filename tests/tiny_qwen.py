"""A small random Qwen3 folder and a tokenizer made as Qwen's is, both written by Hugging Face's own libraries."""

import json
import random
import unicodedata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ROWS, PIECES = 1280, 1200  # of the embedding, and of the tokenizer without its added tokens
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
        r"\s+")
ASSIGNED = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def ugly(count: int, seed: int = 0) -> str:
    """Text of `count` bits that tokenizers get wrong: scripts, marks that combine, line ends, runs, code, no width."""
    draw = random.Random(seed)
    bits = ["\r\n", "\t", "\t\t ", " ", "  ", "\n", "\n\n\n", "\u200b", "\u200d", "\ufe0f", "\u0301",
            "\u0323\u0301", "'s", "'LL", "'\u017f", " 12345,67", "def f(x):\n    return x[1:]  # why?\n",
            "\U0001f469\u200d\U0001f469\u200d\U0001f467", "漢字かな交じり文。", "नमस्ते दुनिया", "안녕",
            "\u1100\u1161\u11a8", "ﬁ", "\u212b", "e\u0301", "\x00", "\x1c", "\x85", "\u2028", "\u3000",
            " the quick brown fox", "don't WE'VE", "<|im_", "()=>{}", " " * 300, "a" * 300, "!" * 70]
    return "".join(draw.choice(bits) if draw.random() < 0.8 else draw.choice(ASSIGNED) for _ in range(count))


def make_tokenizer():
    """Hugging Face's tokenizer, made as Qwen's is."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    texts = [*((ROOT / "docs").glob("*.md")), *(ROOT / "tokenizers").glob("*.py")]
    made.train_from_iterator([path.read_text() for path in texts] + [ugly(3000, 1)], trainers.BpeTrainer(
        vocab_size=PIECES, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ADDED])
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return made


def write_qwen(folder: Path, tokenizer, tied=True, dtype=torch.float32, shard="5GB", layers=2):
    """A random Qwen3, saved as transformers does; every parameter is random, so that none can hide."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=ROWS, hidden_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, tie_word_embeddings=tied, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Read again: .float() would leave it the rotary frequencies that .to(bfloat16) rounded.
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
