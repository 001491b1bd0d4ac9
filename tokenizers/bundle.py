"""All tokenizers of a run and the vocabulary they share: documents and media to ids and back."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onevocab.common.errors import UserError
from onevocab.common.files import hash_json, read_json, sha256_file, write_atomic, write_json
from onevocab.tokenizers.document import Document, Encoded, decode_document, encode_document, split_segments
from onevocab.tokenizers.modalities import MODALITIES, registered
from onevocab.tokenizers.text import TextTokenizer
from onevocab.tokenizers.vocabulary import Vocabulary


def save_media_tokenizer(folder: Path, tokenizer) -> None:
    """Writes FOLDER/NAME.json (configuration) and FOLDER/NAME.safetensors (weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{tokenizer.name}.safetensors.part"
    save_file({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, aside)
    aside.replace(folder / f"{tokenizer.name}.safetensors")
    write_json(folder / f"{tokenizer.name}.json", tokenizer.config.model_dump(mode="json"))


def load_media_tokenizer(folder: Path, name: str, device="cpu"):
    """The inverse. Raises UserError when a file is missing or does not fit."""
    modality = registered(name)
    config = read_json(folder / f"{name}.json")
    weights = folder / f"{name}.safetensors"
    try:
        tokenizer = modality.tokenizer(modality.config.model_validate(config))
        tokenizer.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights} cannot be loaded ({reason}); train the {name} tokenizer again") from None
    return tokenizer.eval().requires_grad_(False).to(device)


class Tokenizers:
    """text: TextTokenizer; media: {name: tokenizer} in the order of the vocabulary."""

    def __init__(self, text: TextTokenizer, media: dict):
        self.text, self.media = text, media
        self.vocab = Vocabulary.build(text.size, [tokenizer.layout for tokenizer in media.values()],
                                      text.size - text.stop)
        self._hash: str | None = None
        self.folder: Path | None = None  # where they are saved

    def save(self, folder) -> None:
        """Writes vocabulary.json, text.json, and each media tokenizer's files."""
        folder = Path(folder)
        write_atomic(folder / "text.json", json.dumps(self.text.to_json()))
        for tokenizer in self.media.values():
            save_media_tokenizer(folder, tokenizer)
        write_json(folder / "vocabulary.json", self.vocab.to_json())
        self._hash, self.folder = self._hash_folder(folder, self.media), folder

    @staticmethod
    def load(folder, device="cpu") -> "Tokenizers":
        """Raises UserError when the folder is missing, half written, or its parts do not fit each other."""
        folder = Path(folder)
        if not (folder / "vocabulary.json").is_file():
            raise UserError(f"{folder} holds no finished tokenizers (vocabulary.json is missing); "
                            "run `torchrun train.py` on this run's configuration")
        vocab = Vocabulary.from_json(read_json(folder / "vocabulary.json"))
        text = TextTokenizer.from_json(read_json(folder / "text.json"))
        unknown = [span.name for span in vocab.ranges if span.name not in MODALITIES]
        if unknown:
            raise UserError(f"{folder} uses modalities that this version does not know: {', '.join(unknown)}")
        bundle = Tokenizers(text, {name: load_media_tokenizer(folder, name, device) for name in vocab.spans})
        if bundle.vocab != vocab:
            raise UserError(f"{folder}: the tokenizers do not fit vocabulary.json; restore the folder as it was")
        bundle._hash, bundle.folder = Tokenizers._hash_folder(folder, bundle.media), folder
        return bundle

    @staticmethod
    def _hash_folder(folder: Path, media) -> str:
        files = ["vocabulary.json", "text.json", *(f"{name}.{end}" for name in media for end in
                                                   ("json", "safetensors"))]
        return hash_json({file: sha256_file(folder / file) for file in files})

    @property
    def hash(self) -> str:
        """Identifies what the codes mean; only saved tokenizers have one."""
        if self._hash is None:
            raise ValueError("save the tokenizers first")
        return self._hash

    def encode(self, document: Document) -> Encoded:
        return encode_document(document, self.vocab, self.text.encode)

    def encode_prompt(self, document: Document, role: str = "assistant") -> np.ndarray:
        """A conversation -> ids that end where `role` begins to speak, int32 (n,)."""
        return encode_document(document, self.vocab, self.text.encode, open_role=role).ids

    def decode(self, ids) -> Document:
        """Raises ValueError when the ids are not a whole document."""
        return decode_document(np.asarray(ids), self.vocab, self.text.decode)

    def decode_turn(self, ids) -> list[tuple[str, object]]:
        """Ids of one turn's content -> [(modality, text or codes)]. Raises ValueError on a malformed span."""
        return split_segments(np.asarray(ids), self.vocab, self.text.decode)

    def _medium(self, modality: str):
        if modality not in self.media:
            raise UserError(f"this model has no {modality}; it knows {', '.join(self.vocab.modalities)}")
        return self.media[modality]

    @torch.inference_mode()
    def encode_batch(self, modality: str, sources: list) -> list[np.ndarray]:
        """Values of a modality, paths or bytes of files -> codes of each. Raises UserError as its tokenizer does."""
        return self._medium(modality).encode_batch(sources)

    def encode_media(self, modality: str, source) -> np.ndarray:
        """One of `encode_batch`'s."""
        return self.encode_batch(modality, [source])[0]

    def decode_media(self, modality: str, codes):
        """Codes -> a value of the modality: a PIL image, or (float32 samples, 16000)."""
        return self._medium(modality).decode_batch([codes])[0]
