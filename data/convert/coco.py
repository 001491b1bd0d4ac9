"""COCO: captions as plain documents, instances as conversations that ask where things are.

A box is text, `dog 12 04 33 60`: left, top, right and bottom in hundredths of the picture, 00 to 99, as in the demo.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from onevocab.data.convert import tables
from onevocab.data.convert.options import CAPTIONS, MEDIA, TURNS, Format
from onevocab.data.convert.samples import Converted, Dropped, Row, exchanges, id_of, list_of, pairs, text_of

MAX_BOXES = 20  # of one kind in one answer
ASK = ("Where is every {name}? Give a box for each: left, top, right, bottom, from 00 to 99.",
       "Find all boxes of: {name}. Write left, top, right and bottom, from 00 to 99.",
       "Give the box of each {name} as left, top, right, bottom in hundredths of the picture.")


def _by_image(path: Path) -> Iterator[tuple[str, dict, list[dict]]]:
    """(where it stands, an entry of `images`, its annotations); an empty entry for annotations of a picture that is not
    listed."""
    annotated: dict = {}
    for annotation in tables.objects(path, "annotations"):
        annotated.setdefault(id_of(annotation, "image_id"), []).append(annotation)
    for image in tables.objects(path, "images"):
        number = id_of(image, "id")
        yield f"{path.name}#{number}", image, annotated.pop(number, [])
    for number, annotations in annotated.items():
        yield f"{path.name}#{number}", {}, annotations


def _files(image: dict) -> list[str]:
    """Where the picture may lie. LVIS names it by its URL alone, the file's name is unique in COCO."""
    file, url = text_of(image.get("file_name")), text_of(image.get("coco_url"))
    return [file] if file else [url, url.rpartition("/")[2]] if url else []


# ------------------------------------------------------------------------------------------------ captions


def _caption_rows(options, unit: Path) -> Iterator[Row]:
    for name, image, annotations in _by_image(unit):
        captions = [annotation.get("caption") for annotation in annotations]
        yield name, (_files(image), captions) if _files(image) else Dropped("bad record", "no file_name")


def _captions(options, name: str, row) -> Iterator[Converted | Dropped]:
    files, captions = row
    return pairs(lambda: options.media.parts(*files), captions, options.captions)


# ------------------------------------------------------------------------------------------------ boxes


def to_box(bbox, width: float, height: float) -> tuple[int, int, int, int] | None:
    """[x, y, w, h] in pixels -> x0, y0, x1, y1 in 0..99; None for what is no box, or lies outside of the picture."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in bbox):
        return None
    x, y, w, h = bbox
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    if x1 <= x0 or y1 <= y0:
        return None
    sides = (width, height, width, height)
    return tuple(min(99, int(edge * 100 / side)) for edge, side in zip((x0, y0, x1, y1), sides, strict=True))


def _box_units(options) -> list[Path]:
    """Of a folder without `person_keypoints_*`, which repeat the boxes of `instances_*`."""
    files = tables.files_of(options, (".json",))
    return [path for path in files if path == options.source or not path.name.startswith("person_keypoints")]


def _box_rows(options, unit: Path) -> Iterator[Row]:
    """Records are (entry of `images`, [(name of the kind, bbox, whether the picture has more of it than boxes)])."""
    names = {id_of(category, "id"): text_of(category.get("name")).replace("_", " ")  # LVIS: fire_hydrant
             for category in tables.objects(unit, "categories")}
    for name, image, annotations in _by_image(unit):
        more = list_of(image.get("not_exhaustive_category_ids"))  # LVIS
        boxes = [(names.get(id_of(a, "category_id"), ""), a.get("bbox"),
                  bool(a.get("iscrowd")) or a.get("category_id") in more) for a in annotations]
        if not _files(image):
            yield name, Dropped("bad record", "no file_name")
        else:
            yield name, (image, boxes) if boxes else Dropped("no boxes")


def _boxes(options, name: str, row) -> Iterator[Converted | Dropped]:
    image, annotations = row
    width, height = image.get("width"), image.get("height")
    if not all(type(side) in (int, float) and 0 < side < 1e9 for side in (width, height)):
        raise Dropped("bad record", "no width and height")
    by_kind: dict[str, list] = {}
    for kind, bbox, more in annotations:
        by_kind.setdefault(kind, []).append(None if more else to_box(bbox, width, height))
    asked, left_out = [], []
    for kind, boxes in by_kind.items():
        # An answer that leaves some out would teach to overlook them.
        if not kind or None in boxes or len(boxes) > MAX_BOXES:
            left_out.append(Dropped("boxes incomplete", f"{kind or 'no name'}: a crowd, a broken box, or too many"))
            continue
        ask = ASK[zlib.crc32(f"{name} {kind}".encode("utf-8", "replace")) % len(ASK)]
        answer = "; ".join(" ".join([kind, *(f"{edge:02d}" for edge in box)]) for box in sorted(dict.fromkeys(boxes)))
        asked.append((ask.format(name=kind), answer))
    if not asked:
        raise left_out[0]
    return exchanges(options.media.parts(*_files(image)), asked, options.turns, left_out=left_out)


FORMATS = {
    "coco-captions": Format("JSON of images and annotations with captions", tables.units_of(".json"), _caption_rows,
                            _captions, (MEDIA, CAPTIONS)),
    "coco-boxes": Format("JSON of images, categories and annotations with boxes (LVIS too): questions where things are",
                         _box_units, _box_rows, _boxes, (MEDIA, TURNS)),
}
