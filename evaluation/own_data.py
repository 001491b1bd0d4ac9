"""What is asked of a run without tasks of its own: its held-out samples.

The losses on them; their captions and answers, compared with the references; what is made from their texts, to look at;
and what the tokenizers lose of their media. Tokenizers are trained on all of [data] shards, held-out samples included:
they see no text.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from onevocab.common.errors import UserError, invalid
from onevocab.data.codes import codes_names
from onevocab.data.documents import UNDECODABLE, BadSample, document_of
from onevocab.data.held_out import read_limits
from onevocab.data.loader import LoaderConfig, PackedLoader
from onevocab.data.shards.format import npy_to_codes
from onevocab.data.shards.index import IndexedShard
from onevocab.data.shards.remote import ShardCache, list_sources, local_name, placed, read_source
from onevocab.data.source import Source
from onevocab.data.turns import CAPTION, read_wordings
from onevocab.evaluation import metrics
from onevocab.evaluation.metrics import row
from onevocab.generation.anytoany import STAGES
from onevocab.tasks import Card, Item, Metric, Section, Session, Task
from onevocab.tasks.registry import TaskModule
from onevocab.tokenizers.autoencoder import GridAutoencoder
from onevocab.tokenizers.document import Document, MediaFile
from onevocab.tokenizers.modalities import MODALITIES
from onevocab.training.held_out import held_out_losses
from onevocab.training.loop import NextTokenLoss

HELD_OUT = "held-out samples"
MOST, SHOWN = 600, 12  # held-out samples that are opened; cards of reconstructions
RECONSTRUCTED = Section("Through the tokenizers", "Held-out media, and the same after encoding and decoding: no model "
                        "output can be better.")


def best_of(score):
    """A metric's score: the reply against the reference that it is nearest to."""
    return lambda answer, reply: (max(score(reference, reply) for reference in answer["references"]), 1)


COMPARED = (("exact match", best_of(lambda one, other: float(metrics.normal(one) == metrics.normal(other)))),
            ("words shared (F1)", best_of(metrics.token_f1)), ("ROUGE-L", best_of(metrics.rouge_l)))
MADE = (("replies that hold one", lambda answer, value: (float(value is not None), 1)),)  # nobody judges what it is


class HeldOutTask(Task):
    """Items are taken from a list, not drawn."""

    held_out, reworded = HELD_OUT, False

    def __init__(self, name: str, want: str, media: tuple[str, ...], found: list[Item], section: Section,
                 compared=COMPARED, count: str = "items"):
        self.name, self.want, self.media, self.found = name, want, media, found
        self.section, self.count = section, count
        self.metrics = tuple(Metric(name, *each) for each in compared)

    def example(self, rng, split, wording):
        raise NotImplementedError("held-out samples are not drawn")

    def items(self, split: str, n: int, seed: int) -> list[Item]:
        return self.found[:n]

    def right(self, item: Item):
        return item.answer["references"][0] if self.want == "text" else item.answer[self.want]

    def card(self, item: Item, reply, verdict) -> Card:
        parts = [part for message in item.messages for part in message["content"]]
        lines = [("asked", " ".join(part for part in parts if isinstance(part, str)))]
        media = [("given", part) for part in parts if not isinstance(part, str)]
        media += [("model", values[0]) for values in reply.media.values() if values]
        if self.want == "text":
            lines += [("reference", item.answer["references"][0]), ("model", reply.text)]
        else:
            media.append(("held out", item.answer[self.want]))
        return Card(media, lines)


@dataclass
class HeldOut:
    """loader: of the run's last stage; documents: the first of its held-out ones, media as `Modality.load` gives them;
    files: of each modality {bytes of a medium: its value}; decoded: how many media are seen through the tokenizers
    alone, because the raw shards were not found; wordings: of the first source."""

    loader: PackedLoader
    documents: list[Document]
    files: dict[str, dict[bytes, object]]
    decoded: int
    wordings: object


def read_held_out(run: Path, settings: dict, tokenizers) -> HeldOut:
    """Opens a run's held-out samples. Raises UserError when its configuration or its shards cannot be read."""
    stage = next((name for name in STAGES if name in settings and (run / name).is_dir()), None)
    if stage is None:
        raise UserError(f"{run / 'config.toml'} has no language stage whose held-out samples could be asked about")
    try:
        sources = TypeAdapter(list[Source]).validate_python(settings[stage].get("sources"))
        rows = LoaderConfig.model_validate(settings[stage].get("loader", {}))
    except ValidationError as error:
        raise invalid(error, f"{run / 'config.toml'}: [{stage}]") from None
    sources = [source.placed(run) for source in sources]
    allowed = {key: value for key, value in settings.get("data", {}).items() if key == "max_bad_fraction"}
    loader = PackedLoader(sources, tokenizers, rows, cache_folder=run / "token_cache", instruct=stage == "instruct",
                          **allowed)
    loader.measure_below(read_limits(run, STAGES))
    samples = _samples(loader.held_out_samples()[:MOST])
    raw = _raw_documents(run, settings, {(local_name(shard), sample.key) for shard, sample in samples})
    held = HeldOut(loader, [], defaultdict(dict), 0, read_wordings(sources[0].wordings))
    for shard, sample in samples:
        try:
            document = raw.get((local_name(shard), sample.key)) or document_of(sample)
            opened = document.map_media(lambda name, file: _open(name, file, tokenizers, held))
            held.documents.append(opened.normalised())
        except (BadSample, ValueError, *UNDECODABLE):
            continue  # named when it was encoded, or when the raw shard was
    return held


def _samples(places: list[tuple[str, int]]) -> list:
    """(shard, sample) of these places, in their order."""
    by_shard, found = defaultdict(list), {}
    for shard, place in places:
        by_shard[shard].append(place)
    for shard, wanted in by_shard.items():
        with IndexedShard(ShardCache().fetch(shard), verify=True, salvage=True, name=shard) as samples:
            found |= {(shard, place): samples[place] for place in wanted}
    return [(shard, found[shard, place]) for shard, place in places]


def _raw_documents(run: Path, settings: dict, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], Document]:
    """The documents of these (shard's name, key) as they lie in the raw shards; those that are not there are left
    out."""
    found: dict = {}
    try:
        shards = list(chain(*(list_sources(placed(run, path)) for path in settings.get("data", {}).get("shards", ()))))
        names = codes_names(shards)
    except UserError:
        return found
    for shard, codes in zip(shards, names, strict=True):
        keys = {key for name, key in wanted if name == codes}
        for sample in read_source(shard) if keys else ():
            if sample.key in keys:
                keys.discard(sample.key)
                try:
                    found[codes, sample.key] = document_of(sample)
                except BadSample:
                    pass
            if not keys:
                break
    return found


def _open(name: str, file: MediaFile, tokenizers, held: HeldOut):
    if file.holds_codes:
        held.decoded += 1
        return tokenizers.decode_media(name, npy_to_codes(file.content))
    value = MODALITIES[name].load(file.content)
    held.files[name][file.content] = value
    return value


# ------------------------------------------------------------------------------------------------ the tasks


def task_module(model, run: Path, settings: dict) -> TaskModule:
    """The tasks of a run's own held-out samples. Raises UserError when it has none."""
    held = read_held_out(run, settings, model.tokenizers)
    if not held.documents:
        raise UserError(f"{run} holds no samples out, so there is nothing to evaluate; set `valid` of its sources, or "
                        "name tasks of your own ([evaluate] tasks)")
    tasks = [*_captions(held), *_answers(held)] or [*_beginnings(held, model), *_alone(held)]

    class OwnData(OwnDataSession):
        data, network = held, model.model

    return TaskModule(tuple(tasks), OwnData)


def _captions(held: HeldOut) -> list[Task]:
    """Media described, and one medium made from its text; captions of the same media are references together."""
    found: dict[str, dict] = defaultdict(dict)  # modality, or "any" of several media -> {their bytes: (them, texts)}
    for document in held.documents:
        media, parts = [part.content for part in document.media], [part.modality for part in document.segments]
        if media and not document.is_conversation and parts.count("text") == 1 and "text" in (parts[0], parts[-1]):
            name = document.media[0].modality if len(media) == 1 else "any"
            key = tuple(MODALITIES[part.modality].to_shard(part.content) for part in document.media)
            [text] = [part.content for part in document.segments if part.modality == "text"]
            found[name].setdefault(key, (media, []))[1].append(text)
    return [task for name, captioned in found.items() for task in _of_captions(held, name, [*captioned.values()])]


def _of_captions(held: HeldOut, name: str, captioned: list[tuple[list, list[str]]]) -> list[Task]:
    """captioned: (media, their texts); name: of their modality, "any" where each has several media."""
    wordings, plural = getattr(held.wordings, name), "several media" if name == "any" else MODALITIES[name].plural
    about = [Item([{"role": "user", "content": [*media, wordings.describe[number % len(wordings.describe)]]}], "text",
                  {"references": texts}) for number, (media, texts) in enumerate(captioned)]
    tasks = [HeldOutTask(f"describe_{name}", "text", _media(held) if name == "any" else (name,), about, Section(
        f"Descriptions of {plural}", "What the model says of held-out ones."), count="captions")]
    if name == "any":
        return tasks
    requests = [wordings.make[number % len(wordings.make)] for number in range(len(captioned))]
    asked = [Item([{"role": "user", "content": [request.replace(CAPTION, texts[0])]}], name, {name: value})
             for request, ([value], texts) in zip(requests, captioned, strict=True)]
    return [*tasks, HeldOutTask(f"make_{name}", name, (name,), asked, Section(
        f"Made from words: {plural}", "From the text of held-out samples, which stand beside them. Nobody judges them: "
        "look."), MADE)]


def _answers(held: HeldOut) -> list[Task]:
    """Conversations whose last turn is the assistant's, a text or a medium."""
    found: dict[str, list[Item]] = defaultdict(list)
    for document in held.documents:
        *before, (role, last) = document.turns
        if role == "assistant" and before and len(last) == 1:
            messages = [{"role": who, "content": [part.content for part in parts]} for who, parts in before]
            want, right = last[0].modality, last[0].content
            found[want].append(Item(messages, want, {"references": [right]} if want == "text" else {want: right}))
    return [HeldOutTask("answers" if want == "text" else f"answers_{want}", want, _media(held), items, Section(
        "Answers" if want == "text" else f"Answers: {MODALITIES[want].plural}", "Of held-out conversations, the last "
        "turn."), COMPARED if want == "text" else MADE) for want, items in found.items()]


def _media(held: HeldOut) -> tuple[str, ...]:
    return tuple(sorted({part.modality for document in held.documents for part in document.media}))


def _beginnings(held: HeldOut, model) -> list[Task]:
    """Texts, cut in the middle of what half a context holds."""
    text, items = model.tokenizers.text, []
    for document in held.documents:
        if [part.modality for part in document.segments] == ["text"]:
            ids = text.encode(document.segments[0].content)[: model.context_length // 2]
            first, second = text.decode(ids[: len(ids) // 2]), text.decode(ids[len(ids) // 2 :])
            items.append(Item([{"role": "user", "content": [first]}], "text", {"references": [second]}))
    return [HeldOutTask("texts", "text", (), items, Section("Texts", "Held-out texts, continued from their first "
                        "half."))] if items else []


def _alone(held: HeldOut) -> list[Task]:
    """Media without a word: more of their kind, made from an empty request."""
    found: dict[str, list[Item]] = defaultdict(list)
    for document in held.documents:
        for part in document.media:
            found[part.modality].append(Item([{"role": "user", "content": [""]}], part.modality,
                                             {part.modality: part.content}))
    return [HeldOutTask(f"make_{name}", name, (name,), items, Section(
        f"Made from nothing: {MODALITIES[name].plural}", "Held-out ones stand beside them. Nobody judges them: look."),
        MADE) for name, items in found.items()]


class OwnDataSession(Session):
    """data: HeldOut; network: the model's decoder."""

    data: HeldOut
    network: object

    def reconstructions(self, count: int) -> tuple[list[dict], dict]:
        """The losses on held-out samples too."""
        rows, cards = self._losses(), []
        for name, files in self.data.files.items():
            if name not in self.tokenizers.media:
                continue
            scores, tokenizer = [], copy.deepcopy(self.tokenizers.media[name])  # a training set may set its statistics
            for content, value in islice(files.items(), count):
                [decoded] = self.through_tokenizer(name, [value])
                score = _psnr(tokenizer, content, MODALITIES[name].to_shard(decoded))
                if score is not None:
                    scores.append((score, 1))
                    if len(scores) <= SHOWN:
                        cards.append(Card([("original", value), ("decoded", decoded)], [("PSNR", f"{score:.1f} dB")]))
            rows.append(row(f"{name}_reconstruction_psnr", HELD_OUT, "dB of the tokenizer's input, mean", scores))
        if self.data.decoded:
            self.notes.append(f"{self.data.decoded:,} held-out media were not found in [data] shards; they are shown "
                              "as their codes are decoded, and are not among the reconstructions.")
        return rows, {RECONSTRUCTED: cards}

    def _losses(self) -> list[dict]:
        device = next(self.network.parameters()).device
        names, held = self.tokenizers.vocab.modalities, len(self.data.loader.held_out_samples())
        losses = held_out_losses(NextTokenLoss(self.network, 0.0), self.data.loader.held_out(256), names, "float32",
                                 device)
        return [{**row("held_out_loss", HELD_OUT, f"nats a token of {name}", losses[f"valid_loss_{name}"]), "n": held}
                for name in names if f"valid_loss_{name}" in losses]


def _psnr(tokenizer, original: bytes, decoded: bytes) -> float | None:
    """Of what the tokenizer's network is to make of two files; the peak is the original's range."""
    one, other = (np.asarray(tokenizer.training_set([content]), np.float64) for content in (original, decoded))
    n = min(len(one), len(other))
    if not n:
        return None
    if isinstance(tokenizer, GridAutoencoder):  # without what it is made from, which may be altered
        one, other = one[:, -tokenizer.channels :], other[:, -tokenizer.channels :]
    error = np.mean((one[:n] - other[:n]) ** 2)
    return float(min(100.0, 10 * np.log10(max(np.ptp(one), 1e-9) ** 2 / max(error, 1e-12))))
