"""Documents whose media are files: what is read from a sample, and what is written."""

import numpy as np
from samples import as_json, flac, grid, image, png, raw_samples, say, text

from onevocab.data.documents import codes_document, document_of, members_of, modality_of_ending, read_media
from onevocab.data.shards.format import Sample, npy_to_codes
from onevocab.tokenizers.document import Document, MediaFile, Segment, conversation, plain_document


def sample(members: dict) -> Sample:
    return Sample("k", members, "s.tar")


def test_what_is_written_is_read_back():
    picture, sound, codes = MediaFile("png", png(0)), MediaFile("flac", flac(0)), MediaFile("image.npy", grid(0))
    talk = conversation([("system", [("text", "é 漢字")]), ("user", [("image", picture), ("text", "and"), (
        "audio", sound), ("image", picture), ("image", codes)]), ("assistant", [("text", "")])])
    members = members_of(talk, {"source": "é"})
    assert list(members) == ["0.png", "1.flac", "2.image.npy", "json"]
    assert members_of(talk, {}, ensure_ascii=True)["json"].isascii() and "é".encode() in members["json"]
    back = document_of(sample(members))
    assert [(role, len(segments)) for role, segments in back.turns] == [("system", 1), ("user", 5), ("assistant", 1)]
    assert back == talk.map_media(lambda modality, file: MediaFile(
        {picture: "0.png", sound: "1.flac", codes: "2.image.npy"}[file], file.content))
    assert members_of(back, {"source": "é"}) == members
    for _, members in raw_samples(6):  # those that are not written so too
        once = members_of(document_of(sample(members)), {})
        assert members_of(document_of(sample(once)), {}) == once
        assert [(s.modality, getattr(s.content, "content", s.content)) for s in document_of(sample(once)).segments] == [
            (s.modality, getattr(s.content, "content", s.content)) for s in document_of(sample(members)).segments]


def test_files_of_the_same_bytes_are_one_only_where_they_are_one():
    one, other = MediaFile("png", png(0)), MediaFile("png", png(0))
    assert one == other and list(members_of(plain_document([("image", one), ("image", other)]), {})) == [
        "0.png", "1.png", "json"]
    seen = []
    twice = plain_document([("image", one), ("text", "x"), ("image", one)])
    changed = twice.map_media(lambda modality, file: seen.append((modality, file)) or np.zeros((2, 2)))
    assert seen == [("image", one)] and changed.segments[0].content is changed.segments[2].content
    assert changed.segments[1] == Segment("text", "x") and [s.modality for s in changed.media] == ["image", "image"]


def test_a_file_shown_twice_is_decoded_once():
    content = [image("0.image.npy"), text("x"), image("0.image.npy")]
    members = {"json": as_json({"messages": [say("user", *content)]}), "0.image.npy": grid(0)}
    document, read = document_of(sample(members)), []
    assert document.segments[0].content is document.segments[2].content and document.media[0].content.holds_codes
    codes = read_media(sample(members), document, lambda _, file: read.append(1) or npy_to_codes(file.content))
    assert read == [1] and codes == codes_document(sample(members)) and codes.turns[0][0] == "user"


def test_turns():
    assert Document(()).turns == [] and not Document(()).media
    neighbours = conversation([("user", [("text", "a")]), ("user", []), ("assistant", [("text", "b")])])
    assert [(role, [s.content for s in segments]) for role, segments in neighbours.turns] == [
        ("user", ["a"]), ("user", [""]), ("assistant", ["b"])]
    mixed = Document((Segment("text", "a", turn=0), Segment("text", "b", turn=1)))  # of no role: one turn
    assert mixed.turns == [(None, list(mixed.segments))]


def test_modalities_by_ending():
    endings = {"0.png": "image", "jpeg": "image", "1.flac": "audio", "0.image.npy": "image", "audio.npy": "audio",
               "npy": None, "x.npy": None, "txt": None}
    assert {ending: modality_of_ending(ending) for ending in endings} == endings
