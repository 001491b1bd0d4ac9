"""Web pages as plain documents of texts and pictures in the order of the page: MMC4 and OBELICS."""

from collections.abc import Iterator

from onevocab.data.convert import tables
from onevocab.data.convert.options import Format
from onevocab.data.convert.samples import Converted, Dropped, field_of, list_of, text_of
from onevocab.tokenizers.document import Part, plain_document

SEPARATOR = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"  # OBELICS leaves it in texts, between documents of one page


def _document(items: list[str | list[Part]], left_out: list[Dropped], space: str) -> Iterator[Converted]:
    """Texts and media in order -> a document; `space` joins texts that follow each other. Raises Dropped when no medium
    is left: a page is here for its pictures."""
    parts: list[Part] = []
    for item in items:
        if not isinstance(item, str):
            parts += item
        elif item and parts and parts[-1][0] == "text":
            parts[-1] = "text", parts[-1][1] + space + item
        elif item:
            parts.append(("text", item))
    if all(modality == "text" for modality, _ in parts):
        raise left_out[0] if left_out else Dropped("missing media", "a page without pictures")
    yield Converted(plain_document(parts), left_out)


def _take(options, value, left_out: list[Dropped]) -> list[Part]:
    """A picture of a page, [] where the page has to do without."""
    try:
        return options.media.take(value)
    except Dropped as dropped:
        left_out.append(dropped)
        return []


def _mmc4(options, name: str, record) -> Iterator[Converted]:
    """A picture stands before the sentence that it was matched with."""
    sentences = list_of(field_of(record, "text_list"))
    before: dict[int, list] = {}
    left_out: list[Dropped] = []
    for picture in list_of(field_of(record, "image_info")):
        place = field_of(picture, "matched_text_index")
        if type(place) is not int or not 0 <= place < len(sentences):
            left_out.append(Dropped("bad record", f"matched_text_index {place!r}"))
        else:
            before.setdefault(place, []).append(_take(options, field_of(picture, "image_name"), left_out))
    items: list[str | list[Part]] = []
    for i, sentence in enumerate(sentences):
        items += [*before.get(i, []), text_of(sentence)]
    return _document(items, left_out, " ")


def _obelics(options, name: str, record) -> Iterator[Converted | Dropped]:
    """`images` and `texts` have one length; of each place one holds something. Pictures are URLs, or files."""
    pictures, texts = list_of(field_of(record, "images")), list_of(field_of(record, "texts"))
    if len(pictures) != len(texts):
        raise Dropped("bad record", f"{len(pictures)} images and {len(texts)} texts")
    documents: list[tuple[list, list[Dropped]]] = [([], [])]  # (texts and media, what is left out) of each
    for picture, text in zip(pictures, texts, strict=True):
        items, left_out = documents[-1]
        items.append([] if picture is None else _take(options, picture, left_out))
        first, *others = text_of(text).split(SEPARATOR)
        items.append(first.strip())
        documents += [([other.strip()], []) for other in others]
    for items, left_out in documents:
        if any(items) or left_out or len(documents) == 1:
            try:
                yield from _document(items, left_out, "\n\n")
            except Dropped as dropped:  # the others of the page are kept
                yield dropped


FORMATS = {
    "mmc4": Format("JSON lines of text_list and image_info (also zipped), pictures by image_name below --media",
                   tables.units_of(*tables.LINES), tables.rows_of, _mmc4),
    "obelics": Format("parquet or JSON lines of images and texts; of a picture's URL the end below --media",
                      tables.units_of(*tables.LINES, *tables.COLUMNS), tables.rows_of, _obelics),
}
