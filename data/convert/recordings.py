"""Sounds and videos with captions or transcripts: Clotho, AudioCaps, WavCaps, LibriSpeech, Common Voice, MSR-VTT.

A recording and what is said of it, or in it, become a plain document of two parts.
"""

from collections.abc import Iterator
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.data.convert import streams, tables
from onevocab.data.convert.captions import captions_of
from onevocab.data.convert.media import kind_of, suffix_of
from onevocab.data.convert.options import CAPTIONS, FILE, FRAMES, MEDIA, SPLIT, Format
from onevocab.data.convert.samples import Converted, Dropped, Row, field_of, fill, id_of, list_of, pairs, text_of


def _clotho(options, name: str, record) -> Iterator[Converted | Dropped]:
    file = text_of(field_of(record, "file_name"))
    return pairs(lambda: options.media.parts(file), captions_of(record, "caption"), options.captions)


def _audiocaps(options, name: str, record) -> Iterator[Converted | Dropped]:
    file = fill(options.file or "{youtube_id}.wav", record)
    return pairs(lambda: options.media.parts(file), captions_of(record, "caption"))


def _voice_units(options) -> list[Path]:
    if options.source.is_dir():
        raise UserError(f"{options.source} holds several lists, of recordings nobody confirmed too: give one of them, "
                        "as validated.tsv")
    return tables.files_of(options, (".tsv",))


def _common_voice(options, name: str, record) -> Iterator[Converted | Dropped]:
    file = text_of(field_of(record, "path"))
    files = [file] if suffix_of(file) else [f"{file}.mp3"]  # early releases name no ending
    return pairs(lambda: options.media.parts(*(p for f in files for p in (f, f"clips/{f}"))),
                 list_of(field_of(record, "sentence")))


# ------------------------------------------------------------------------------------------------ WavCaps


def _wavcaps_rows(options, unit: Path) -> Iterator[Row]:
    for number, record in enumerate(tables.objects(unit, "data")):
        yield f"{unit.name}#{number}", record


def _wavcaps(options, name: str, record) -> Iterator[Converted | Dropped]:
    """The recording of id `a.wav`, or `a`, is `a.flac`."""
    stem = text_of(field_of(record, "id"))
    stem = stem[: -len(suffix_of(stem))] if kind_of(stem) == "audio" else stem
    if not stem:
        raise Dropped("bad record", "no id")
    return pairs(lambda: options.media.parts(f"{stem}.flac"), captions_of(record, "caption"), options.captions)


# ------------------------------------------------------------------------------------------------ LibriSpeech


def _transcripts(options) -> list[Path]:
    return tables.files_of(options, (".txt",), "*.trans.txt")


def _librispeech_units(options) -> list[Path]:
    return [options.source] if _transcripts(options) else []


def _librispeech_rows(options, unit: Path) -> Iterator[Row]:
    folder = unit if unit.is_dir() else unit.parent
    for path in _transcripts(options):
        place = path.parent.relative_to(folder).as_posix()
        try:
            for line in streams.lines(path):
                utterance, _, words = line.decode("utf-8", "surrogateescape").strip().partition(" ")
                yield f"{place}/{utterance}", (f"{place}/{utterance}.flac", words)
        except Dropped as dropped:  # one chapter of many
            yield f"{place}/{path.name}", dropped


def _librispeech(options, name: str, row) -> Iterator[Converted | Dropped]:
    file, words = row
    return pairs(lambda: options.media.parts(file), [words])


# ------------------------------------------------------------------------------------------------ MSR-VTT


def _msrvtt_rows(options, unit: Path) -> Iterator[Row]:
    captions: dict = {}
    for sentence in tables.objects(unit, "sentences"):
        captions.setdefault(id_of(sentence, "video_id"), []).append(sentence.get("caption"))
    for video in tables.objects(unit, "videos"):
        name = id_of(video, "video_id")
        of_video = captions.pop(name, [])
        if options.split not in (None, video.get("split")):
            yield f"{unit.name}#{name}", Dropped("other split", str(video.get("split")))
        else:
            yield f"{unit.name}#{name}", ({"video_id": name}, of_video)
    for name in captions:
        yield f"{unit.name}#{name}", Dropped("bad record", "captions of a video that is not listed")


def _msrvtt(options, name: str, row) -> Iterator[Converted | Dropped]:
    record, captions = row
    file = fill(options.file or "{video_id}.mp4", record)
    return pairs(lambda: options.media.parts(file), captions, options.captions)


FORMATS = {
    "clotho": Format("CSV of file_name and caption_1 to caption_5", tables.units_of(".csv"), tables.rows_of, _clotho,
                     (MEDIA, CAPTIONS)),
    "audiocaps": Format("CSV of youtube_id, start_time and caption; --file says how recordings are called (default: "
                        "{youtube_id}.wav)", tables.units_of(".csv"), tables.rows_of, _audiocaps, (MEDIA, FILE)),
    "wavcaps": Format("JSON of {data: [{id, caption}]}, or a folder of them, beside ID.flac", tables.units_of(".json"),
                      _wavcaps_rows, _wavcaps, (MEDIA, CAPTIONS)),
    "librispeech": Format("a split's folder: SPEAKER/CHAPTER/*.flac and *.trans.txt", _librispeech_units,
                          _librispeech_rows, _librispeech),
    "common-voice": Format("TSV of path and sentence, beside clips/", _voice_units, tables.rows_of, _common_voice),
    "msrvtt": Format("JSON of videos and sentences, beside VIDEO_ID.mp4; frames and sound with each caption",
                     tables.units_of(".json"), _msrvtt_rows, _msrvtt, (MEDIA, SPLIT, CAPTIONS, FRAMES, FILE)),
}
