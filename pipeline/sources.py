"""What a new run starts from: a pretrained Qwen3 folder, or another run. Both give the same things.

`config` (the decoder's shape), `rows` (of the old vocabulary), `vocabulary()`, `text()` and `media()` (tokenizers),
`check()`, `identity()` (of the files, so that a run notices another source), and `load(decoder, vocabulary)`.
"""

from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError

from onevocab.common.checkpoint_files import steps_to_use
from onevocab.common.errors import UserError, invalid
from onevocab.common.files import read_json, sha256_file
from onevocab.common.provenance import first_difference
from onevocab.generation.anytoany import STAGES
from onevocab.model.config import NOT_SHAPE, ModelConfig, ModelSection
from onevocab.model.decoder import Decoder
from onevocab.model.pretrained import agreed, check_weights, read_shape, read_weights, start_from, weight_files
from onevocab.model.weights import load_weights
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.pretrained_text import read_tokenizer
from onevocab.tokenizers.text import TextTokenizer
from onevocab.tokenizers.vocabulary import Vocabulary


def open_source(init: str | None, init_from: str | None):
    """-> PretrainedFolder, OldRun or None. Raises UserError."""
    if init is not None and init_from is not None:
        raise UserError("model.init and init_from are both set; a run starts from one of them")
    if init is not None:
        return PretrainedFolder(init)
    return None if init_from is None else OldRun(init_from)


def take_shape(source, model: ModelSection, written: dict) -> ModelSection:
    """[model] with the shape of the source. Raises UserError where a key that is `written` in the file, or given on the
    command line, says something else."""
    if source is None:
        return model
    given = {key: getattr(model, key) for key in sorted(set(written) - NOT_SHAPE)}
    shape = agreed(source.config, given, source.folder)
    return ModelSection(**shape.model_dump(), **model.model_dump(include=NOT_SHAPE))


class PretrainedFolder:
    """[model] init: config.json, tokenizer.json and safetensors as Hugging Face's transformers writes them."""

    def __init__(self, folder):
        """Raises UserError when config.json is missing or describes another architecture."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"model.init: there is no folder {folder}")
        self.config, self.rows = read_shape(self.folder)

    def check(self) -> None:
        """Looks at the weights' headers and that there is a tokenizer. Raises UserError."""
        check_weights(self.folder, self.config, self.rows)
        if not (self.folder / "tokenizer.json").is_file():
            raise UserError(f"{self.folder / 'tokenizer.json'} is missing")

    def identity(self) -> tuple[dict, dict]:
        """sha256 of what the tokenizer is made of, and of what the weights are, after `check`."""
        self.check()

        def hashes(files):
            return {path.name: sha256_file(path) for path in files}

        text = hashes([self.folder / "config.json", self.folder / "tokenizer.json"])
        return text, hashes([self.folder / "config.json", *weight_files(self.folder)])

    def text(self) -> TextTokenizer:
        return read_tokenizer(self.folder, self.rows)

    def media(self) -> dict:
        return {}

    def vocabulary(self) -> Vocabulary:
        """Without media. How many of the text's ids are in use only the tokenizer tells."""
        return Vocabulary.build(self.rows, [])

    def load(self, decoder: Decoder, vocabulary: Vocabulary) -> None:
        """Puts the weights into a decoder of the same shape, whose vocabulary begins with the text's."""
        start_from(decoder, read_weights(self.folder), torch.from_numpy(vocabulary.in_use()[: self.rows]))


class OldRun:
    """--init-from: a run's tokenizers, all of them, and the newest weights of its last language stage."""

    def __init__(self, folder):
        """Raises UserError when the run holds no tokenizers or no checkpoint."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"init_from: there is no run {folder}")
        tokenizers = self.folder / "tokenizers"
        self._vocabulary = Vocabulary.from_json(read_json(tokenizers / "vocabulary.json"))
        steps = [step for stage in STAGES for step in steps_to_use(self.folder / stage)[:1]]
        if not steps:
            raise UserError(f"init_from: {folder} holds no checkpoint of {' or '.join(STAGES)}")
        self.step = steps[0]
        info = read_json(self.step / "model.json")
        if not isinstance(info, dict) or info.get("vocabulary") != self._vocabulary.hash:
            raise UserError(f"{self.step} was trained with another vocabulary than {tokenizers} holds")
        try:
            self.config = ModelConfig.model_validate(info.get("config"))
        except ValidationError as error:
            raise invalid(error, self.step / "model.json") from None
        self.rows = self._vocabulary.size

    def check(self) -> None:
        """Compares the weights with their manifest. Raises UserError that names what is damaged."""
        load_weights(self.step)

    def identity(self) -> tuple[dict, dict]:
        """Hashes of the tokenizers, and of the newest weights' manifest, after `check`."""
        self.check()
        return {"tokenizers": self._tokenizers.hash}, {"weights": sha256_file(self.step / "manifest.json")}

    @cached_property
    def _tokenizers(self) -> Tokenizers:
        return Tokenizers.load(self.folder / "tokenizers")

    def text(self) -> TextTokenizer:
        return self._tokenizers.text

    def media(self) -> dict:
        return self._tokenizers.media

    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def load(self, decoder: Decoder, vocabulary: Vocabulary) -> None:
        """Puts the weights into a decoder of the same shape, whose vocabulary begins with the old one."""
        if not self._vocabulary.is_prefix_of(vocabulary):
            change = first_difference(self._vocabulary.to_json(), vocabulary.to_json())
            raise UserError(f"{self.folder} has another vocabulary, which does not begin this one ({change})")
        start_from(decoder, load_weights(self.step)[0].items(), torch.from_numpy(self._vocabulary.in_use()))
