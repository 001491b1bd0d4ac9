"""`AnyToAny`: text, pictures and sound in; text, pictures and sound out."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from onevocab.common.checkpoint_files import steps_to_use
from onevocab.common.errors import UserError
from onevocab.generation import engine
from onevocab.generation.defaults import GenerationDefaults
from onevocab.model.config import ModelConfig
from onevocab.model.decoder import Decoder
from onevocab.model.weights import load_into, load_weights
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.document import Document, MediaValue, Segment, conversation
from onevocab.tokenizers.grammar import Grammar
from onevocab.tokenizers.modalities import MODALITIES, modality_of_path, modality_of_value
from onevocab.tokenizers.vocabulary import ROLES, Vocabulary

STAGES = ("instruct", "pretrain")  # the newest first
HOW_TO_MAKE = "make one with `make demo` or `torchrun train.py configs/demo.toml`"
ByModality = float | dict[str, float] | None  # one number, or by modality; None: as the run says
LONGEST_TEXT = 512  # new tokens when nobody says otherwise


@dataclass
class Reply:
    """text: str, "" if none; media: modality -> its values, in order; ids: the new token ids, the end of
    the turn included; segments: the parts in order, media as codes: they can go into the next turn as they
    are; finish_reason: "stop" where the model ended it, "length" where max_new_tokens or the context did;
    prompt_tokens: how many ids were asked with.
    """

    text: str = ""
    media: dict[str, list] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    finish_reason: str = "stop"
    prompt_tokens: int = 0

    @property
    def images(self) -> list[Image.Image]:
        return self.media.get("image", [])  # the two names that everybody asks for

    @property
    def audio(self) -> list[tuple[np.ndarray, int]]:
        """(float32 samples, rate) pairs."""
        return self.media.get("audio", [])


@dataclass
class Event:
    """A piece of a streamed reply. kind: "text" (str), the name of a modality (its value, whole: a PIL
    image, a (samples, rate) pair), that name with "_codes" (of an open span, a sound: int array [columns,
    rows], as they come), "reply" (Reply, the last event). codes: of a whole medium, for the next turn."""

    kind: str
    value: object
    codes: np.ndarray | None = None


class AnyToAny:
    """A trained model with its tokenizers.

        model = AnyToAny.load("runs/demo")
        model.generate([pil_image, "What is this?"], want="text", temperature=0).text

    A prompt is a list of parts: a str (always text), a PIL image, a pathlib.Path (a picture or a sound by
    its ending), a (samples, rate) pair, or a Segment of an earlier reply. A list of {"role", "content"}
    dicts is a conversation, whose content is such a part or a list of them.

    temperature, top_k, top_p and guidance are the run's (`defaults`, from its generation.json) where they
    are None.
    """

    def __init__(self, model: torch.nn.Module, tokenizers: Tokenizers, plain: bool = False,
                 defaults: GenerationDefaults | None = None):
        """plain: the model continues documents (pretrain) instead of answering turns."""
        self.model, self.tokenizers, self.plain = model.eval(), tokenizers, plain
        self.defaults = defaults or GenerationDefaults()
        self.vocab = tokenizers.vocab
        sized = {span.name for span in self.vocab.ranges if span.sized}
        self.grids = {name: [media.max_grid] for name, media in tokenizers.media.items() if name in sized}

    @classmethod
    def load(cls, run, stage: str | None = None, device: str | None = None) -> "AnyToAny":
        """Loads the newest good checkpoint of a run folder: of `stage`, else of instruct, else of pretrain.

        device: default "cuda" where there is one, else "cpu". Reads safetensors and JSON only. Raises
        UserError when the folder does not exist, is half written, or holds a checkpoint of another
        vocabulary.
        """
        run = Path(run)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot compute on {device!r} here ({reason}); try --device cpu") from None
        if not run.is_dir():
            raise UserError(f"no run folder {run}; {HOW_TO_MAKE}")
        if stage is not None and stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}; choose {' or '.join(STAGES)}")
        again = _how_to_finish(run)
        if not (run / "tokenizers" / "vocabulary.json").is_file():
            raise UserError(f"{run} is not a finished run: tokenizers/vocabulary.json is missing; {again}")
        stages = (stage,) if stage else STAGES
        stage = next((name for name in stages if steps_to_use(run / name)), None)
        if stage is None:
            wanted = " or ".join(f"{name}/step-N" for name in stages)
            raise UserError(f"{run} is not a finished run: no checkpoint {wanted} is there; {again}")
        if stage != stages[0]:
            print(f"note: {run} has no {stages[0]} checkpoint yet; {stage} only continues documents",
                  file=sys.stderr)
        tokenizers = Tokenizers.load(run / "tokenizers", device)
        model, defaults = _newest_model(run / stage, tokenizers.vocab), GenerationDefaults.load(run)
        return cls(model.to(device).requires_grad_(False), tokenizers, stage == "pretrain", defaults)

    def generate(self, prompt, want: str = "any", temperature: ByModality = None, top_k: int | None = None,
                 top_p: float | None = None, seed: int = 0, guidance: ByModality = None,
                 max_new_tokens: int | None = None) -> Reply:
        """One reply to one prompt. want: "any" (the model chooses), "text", or a modality.

        The rest: see `Sampling`; max_new_tokens counts ids, a picture's and a sound's too. Raises
        UserError on bad input and when the context is full.
        """
        return self.generate_batch([prompt], want, temperature, top_k, top_p, seed, guidance,
                                   max_new_tokens)[0]

    def generate_batch(self, prompts: list, want: str = "any", temperature: ByModality = None,
                       top_k: int | None = None, top_p: float | None = None, seed: int = 0,
                       guidance: ByModality = None, max_new_tokens: int | None = None, rows: int = 64) -> list[Reply]:
        """A reply to each prompt; row i draws with seed + i, so it equals `generate(prompts[i], seed=seed
        + i)`.

        rows: how many prompts share the model's batch at once.
        """
        sampling = self.defaults.sampling(seed, temperature=temperature, top_k=top_k, top_p=top_p,
                                          guidance=guidance)
        requests = self._requests(prompts, want, sampling.guided, max_new_tokens)
        ids = []
        for start in range(0, len(requests), rows):
            ids += engine.generate(self.model, requests[start : start + rows], sampling)
        return self._replies(ids, requests)

    def stream(self, prompt, want: str = "any", temperature: ByModality = None, top_k: int | None = None,
               top_p: float | None = None, seed: int = 0, guidance: ByModality = None,
               max_new_tokens: int | None = None) -> Iterator[Event]:
        """Like `generate`, as it comes: see `Event`."""
        sampling = self.defaults.sampling(seed, temperature=temperature, top_k=top_k, top_p=top_p,
                                          guidance=guidance)
        requests = self._requests([prompt], want, sampling.guided, max_new_tokens)
        ids: list[int] = []  # all
        start = shown = 0  # of the open segment: its first id, and how much of it was shown
        span = None
        for new in engine.stream(self.model, requests, sampling):
            for id in new[0][1]:
                ids.append(id)
                if span is not None and id == span.end:
                    codes = span.unwrap(np.array(ids[start:]))
                    yield Event(span.name, self.tokenizers.decode_media(span.name, codes), codes)
                    span, start, shown = None, len(ids), 0
                elif span is not None and not span.sized:
                    if (len(ids) - start - 1) % span.rows == 0:
                        column = np.array(ids[-span.rows :]) - span.codes_start
                        yield Event(f"{span.name}_codes", column[None])
                elif span is None and id >= self.vocab.text_size:
                    text = self.tokenizers.text.decode(ids[start:-1])
                    if text[shown:]:
                        yield Event("text", text[shown:])
                    span, start, shown = self.vocab.span_of_begin.get(id), len(ids) - 1, 0
            if span is None and start < len(ids) and ids[-1] < self.vocab.text_size:
                text = self.tokenizers.text.decode(ids[start:])
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may be split over two ids
                    yield Event("text", text[shown:])
                    shown = len(text)
        if span is None and start < len(ids) and ids[-1] < self.vocab.text_size:
            text = self.tokenizers.text.decode(ids[start:])
            if text[shown:]:
                yield Event("text", text[shown:])
        yield Event("reply", self._replies([ids], requests)[0])

    # What frontends ask before they ask for a reply.

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its reply have together."""
        return self.model.config.max_length

    def encode(self, prompt) -> list[dict]:
        """A prompt as messages whose media are codes, so that what is sent again and again is encoded once."""
        return [{"role": role, "content": list(self._documents([parts])[0].segments)}
                for role, parts in _messages(prompt)]

    def count_tokens(self, prompt) -> int:
        """The ids that a prompt takes, the opening of the reply included."""
        return len(self._encode(self._documents([prompt])[0]))

    def longest_reply(self, want: str = "any") -> int:
        """New tokens allowed when the user sets no limit."""
        longest = {"text": LONGEST_TEXT}
        for name, media in self.tokenizers.media.items():
            span = self.vocab.spans[name]
            longest[name] = span.tokens(media.max_grid)
        return longest.get(want, max(longest.values()))

    # From prompts to requests.

    def _requests(self, prompts: list, want: str, guided: bool,
                  max_new_tokens: int | None) -> list[engine.Request]:
        documents = self._documents(prompts)
        limit, requests = self.context_length, []
        if max_new_tokens is None:
            max_new_tokens = self.longest_reply(want)
        elif max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        for row, document in enumerate(documents):
            ids = self._encode(document)
            empty = self._encode(_without_request(document)) if guided and want != "text" else None
            if len(ids) >= limit:
                raise UserError(f"the context is full: the prompt takes {len(ids)} of {limit} tokens; "
                                "shorten it")
            end = self.vocab.end_of_document if self.plain else None
            try:
                grammar = Grammar(self.vocab, want, self.grids, min(max_new_tokens, limit - len(ids)), end)
            except UserError as error:
                used = f" (the prompt takes {len(ids)} of the context's {limit} tokens)"
                raise UserError(f"{error}{used if want in self.vocab.modalities else ''}") from None
            requests.append(engine.Request(ids, grammar, row, empty))
        return requests

    def _encode(self, document: Document) -> np.ndarray:
        if self.plain:
            return self.tokenizers.encode(document).ids[:-1]  # an open end: the model goes on
        return self.tokenizers.encode_prompt(document)

    def _documents(self, prompts: list) -> list[Document]:
        """Prompts -> documents of codes. Media of all prompts are encoded together."""
        documents = [self._document(prompt) for prompt in prompts]
        codes: dict[int, np.ndarray] = {}  # by the id of what they are the codes of
        for name, tokenizer in self.tokenizers.media.items():
            values = [medium.content for document in documents for medium in document.media
                      if medium.modality == name and isinstance(medium.content, MediaValue)]
            encoded = tokenizer.encode_batch([each.value for each in values]) if values else []
            codes |= {id(value): grid for value, grid in zip(values, encoded, strict=True)}
        return [document.map_media(lambda _, content: codes.get(id(content), content)) for document in documents]

    def _document(self, prompt) -> Document:
        """A prompt -> document whose media are values, or codes where they come from a reply."""
        messages = [(role, [_part(part, self.tokenizers.media) for part in parts]) for role, parts in _messages(prompt)]
        document = conversation(messages)
        if self.plain:
            document = Document(tuple(replace(segment, role=None, turn=0) for segment in document.segments))
        return document

    # From ids to replies.

    def _replies(self, all_ids: list[list[int]], requests: list[engine.Request]) -> list[Reply]:
        replies = []
        ends = (self.vocab.end_of_turn, self.vocab.end_of_document)
        for ids, request in zip(all_ids, requests, strict=True):
            parts = self.tokenizers.decode_turn(ids[:-1] if ids and ids[-1] in ends else ids)
            replies.append(Reply(ids=ids, segments=[Segment(*part, role="assistant") for part in parts],
                                 finish_reason="length" if request.grammar.cut else "stop",
                                 prompt_tokens=len(request.prompt)))
        for name, media in self.tokenizers.media.items():
            wanted = [(reply, part.content) for reply in replies for part in reply.segments
                      if part.modality == name]
            values = media.decode_batch([codes for _, codes in wanted])
            for (reply, _), value in zip(wanted, values, strict=True):
                reply.media.setdefault(name, []).append(value)
        for reply in replies:
            reply.text = "".join(part.content for part in reply.segments if part.modality == "text")
        return replies


def _how_to_finish(run: Path) -> str:
    """The command, wherever the folder lies now: its configuration names the place where it was begun."""
    if not (run / "config.toml").is_file():
        return f"no config.toml is there either: check the path, or {HOW_TO_MAKE}"
    return f"finish it with `{shlex.join(['torchrun', 'train.py', f'{run}/config.toml', f'--folder={run}'])}`"


def _newest_model(folder: Path, vocab: Vocabulary) -> Decoder:
    """The newest whole checkpoint; damaged ones are named on stderr. Raises UserError when none is usable."""
    damaged = []
    for step in steps_to_use(folder):
        try:
            weights, info = load_weights(step)
        except UserError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"note: using {step}, because {'; '.join(damaged)}", file=sys.stderr)
        info = info if isinstance(info, dict) else {}
        if (info.get("vocabulary"), info.get("vocab_size")) != (vocab.hash, vocab.size):
            raise UserError(f"{step} was trained with another vocabulary than {folder.parent / 'tokenizers'} "
                            "holds; restore that folder or train again")
        try:
            model = Decoder(ModelConfig.model_validate(info.get("config")), vocab.size)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{step / 'model.json'} describes no model ({reason}); train again") from None
        load_into(model, weights, step)
        return model
    raise UserError(f"no checkpoint in {folder} can be used: {'; '.join(damaged)}; train again")


def _messages(prompt) -> list[tuple[str, list]]:
    """A prompt -> [(role, parts)]. Raises UserError on what is neither parts nor messages."""
    parts = list(prompt) if isinstance(prompt, list) else [prompt]
    if not any(isinstance(part, dict) for part in parts):
        return [("user", parts)]
    messages = []
    for message in parts:
        keys = set(message) if isinstance(message, dict) else None
        if keys != {"role", "content"} or message["role"] not in ROLES:
            raise UserError(f"a message is {{'role': {' | '.join(ROLES)}, 'content': parts}}, "
                            f"found {str(message)[:80]}")
        content = message["content"]
        messages.append((message["role"], list(content) if isinstance(content, list) else [content]))
    return messages


def _part(part, known) -> tuple[str, object]:
    """A prompt's part -> (modality, text, value or codes); known: modalities of media that the model takes."""
    if isinstance(part, str):
        return "text", part
    if isinstance(part, Segment):
        return part.modality, part.content
    if isinstance(part, Path):
        modality = modality_of_path(part)
        part = MODALITIES[modality].load(part)
    else:
        modality = modality_of_value(part)
    if modality not in known:
        raise UserError(f"this model takes no {modality}; it knows text, {', '.join(known)}")
    return modality, MediaValue(part)


def _without_request(document: Document) -> Document:
    """The prompt with the words of its last turn gone, as training drops them, for guidance."""
    last = document.segments[-1].turn if document.segments else 0
    return Document(tuple(
        replace(part, content="") if part.modality == "text" and part.turn == last else part
        for part in document.segments))
