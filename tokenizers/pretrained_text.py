"""A Hugging Face `tokenizer.json` as our text tokenizer: byte-level BPE, the same ids on the same text.

Two things differ from Hugging Face's, on purpose or because they must:

* an added token (`<|im_start|>`, `<think>`, ...) is never recognised in a text: one that is spelled out is text like
  any other. Its row stays in the embedding, but no text is written with it;
* tiktoken merges the pair whose result has the lowest id; Hugging Face follows a list of pairs. A file in which these
  are not the same is refused (`_ranks`).
"""

from itertools import pairwise
from pathlib import Path

from onevocab.common.errors import UserError
from onevocab.common.files import read_json
from onevocab.tokenizers.text import TextTokenizer

# GPT-2's (Radford et al. 2019), which a ByteLevel pre-tokenizer uses unless told otherwise.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST = 1024  # bytes of a piece; Qwen's longest has 128
# Characters of every kind: a pattern that skips one is refused.
PROBE = "A b1 ,.\t\r\n  x\u00e9\u0301\u4e2d \U0001f600\u200b_\x00'S"


def read_tokenizer(folder, size: int) -> TextTokenizer:
    """FOLDER/tokenizer.json -> TextTokenizer with `size` ids, the rows of the model's embedding.

    Raises UserError, naming the file and the key, when it is damaged, is not byte-level BPE, or cannot be represented.
    """
    path = Path(folder) / "tokenizer.json"
    data = read_json(path)
    try:
        pattern, nfc = _pattern(_get(data, "pre_tokenizer", dict)), _nfc(data.get("normalizer"))
        tokenizer = TextTokenizer(_ranks(_get(data, "model", dict), _added(data)), pattern, size, nfc)
        if tokenizer.decode(tokenizer.encode(PROBE)) != tokenizer.normalise(PROBE):
            raise ValueError("pre_tokenizer: its pattern leaves characters out")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}") from None
    return tokenizer


def _get(data, key: str, kind: type):
    """data[key], which must be of that kind. Raises ValueError that names it."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{key} is missing or no {kind.__name__}")
    return value


def _nfc(normalizer) -> bool:
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    kinds = [step.get("type") for step in steps]
    if (normalizer is not None and not isinstance(normalizer, dict)) or set(kinds) - {"NFC"}:
        raise ValueError(f"normalizer {str(normalizer)[:80]}: only NFC, or none, is supported")
    return bool(kinds)


def _pattern(pre_tokenizer: dict) -> str:
    """The regular expression that cuts text before any merge."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *splits, last = [step if isinstance(step, dict) else {} for step in steps] or [{}]
    refused = ValueError(f"pre_tokenizer {str(pre_tokenizer)[:80]}...: only a regular expression that isolates pieces, "
                         "then ByteLevel, is supported")
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) or len(splits) > 1:
        raise refused
    if not splits:
        if not last.get("use_regex", True):
            raise refused
        return GPT2
    split = splits[0]
    pattern = split.get("pattern", {}).get("Regex")
    if (split.get("type"), split.get("behavior"), split.get("invert", False)) != ("Split", "Isolated", False):
        raise refused
    if not isinstance(pattern, str) or last.get("use_regex", True):
        raise refused
    return pattern


def _added(data: dict) -> set[int]:
    """Ids of added tokens, special or not."""
    return {_get(token, "id", int) for token in data.get("added_tokens") or []}


def _alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for in byte-level BPE: printable ones for themselves, the others for the
    characters from U+0100 on (GPT-2's bytes_to_unicode)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(0x100 + i): value for i, value in enumerate(hidden)}


def _ranks(model: dict, added: set[int]) -> dict[bytes, int]:
    """{piece: id}, of which it is certain that tiktoken merges with it as Hugging Face does with its list.

    The conditions: ids rise with the order of merges, and every piece, cut into bytes, is merged back to itself, by a
    pair of the list in the last step. They suffice. Take the first step in which tiktoken would merge neighbours (x, y)
    that are no pair of the list, to s. Until then both have made the same merges, and none across the ends of x and y;
    so the same merges bring s alone to (x, y), with no lower one left: but there the last step is a pair of the list.

    A piece that is not the result of a merge is never made by Hugging Face, and is left out.
    """
    for key, usual in (("type", "BPE"), ("ignore_merges", False)):
        if model.get(key, usual) != usual:
            raise ValueError(f"model.{key} is {model[key]!r}, only {usual!r} is supported")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("model: dropout, prefixes and suffixes of subwords are not supported")
    alphabet, ids = _alphabet(), {}

    def to_bytes(text: str) -> bytes:
        if not text or len(text) > LONGEST or not alphabet.keys() >= set(text):
            raise ValueError(f"model.vocab: {text[:40]!r} is no piece of byte-level BPE, or too long")
        return bytes(map(alphabet.__getitem__, text))

    for text, id in _get(model, "vocab", dict).items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise ValueError(f"model.vocab: the id of {text[:40]!r} is {id!r}")
        if id not in added:
            ids[to_bytes(text)] = id
    ranks = {bytes([value]): ids[bytes([value])] for value in range(256) if bytes([value]) in ids}
    pairs: dict[bytes, set] = {}  # those that make a piece: one; or several, one after the other
    last = None
    for merge in _get(model, "merges", list):
        left, right = map(to_bytes, merge.split(" ") if isinstance(merge, str) else merge)
        piece = left + right
        if piece not in ids or left not in ranks or right not in ranks:
            raise ValueError(f"model.merges: {str(merge)[:60]} makes no piece, or is not made of earlier ones")
        if piece != last and (piece in pairs or (last is not None and ids[piece] <= ids[last])):
            raise ValueError(f"model.merges: the id of {str(merge)[:60]} does not follow the order of merges, which "
                             "tiktoken cannot represent")
        ranks[piece], last = ids[piece], piece
        pairs.setdefault(piece, set()).add((left, right))
    for piece, made_by in pairs.items():
        if _last_pair(piece, ranks) not in made_by:
            raise ValueError(f"model.merges: {piece[:40]!r} is not what its own bytes are merged to")
    return ranks


def _last_pair(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts from which tiktoken's merging makes a piece; None when it does not."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        merge = min(((ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks), default=None)
        if merge is None:
            return None
        at = merge[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts) if len(parts) == 2 else None
