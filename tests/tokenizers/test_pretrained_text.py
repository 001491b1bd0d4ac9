"""A pretrained tokenizer as ours: the same ids as Hugging Face's `tokenizers`, or one line that says why not."""

import json
import random
import time
import unicodedata

import pytest
from tiny_qwen import ADDED, PIECES, ROWS, edit, ugly

from onevocab.common.errors import UserError
from onevocab.tokenizers import text as text_module
from onevocab.tokenizers.bundle import Tokenizers
from onevocab.tokenizers.grammar import Grammar
from onevocab.tokenizers.pretrained_text import read_tokenizer
from onevocab.tokenizers.text import TextTokenizer
from onevocab.tokenizers.vocabulary import Vocabulary


@pytest.fixture
def folder(tmp_path, peer):
    peer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_those_of_hugging_face(folder, peer):
    mine = read_tokenizer(folder, ROWS)
    mine = TextTokenizer.from_json(json.loads(json.dumps(mine.to_json())))  # what sample.py has
    assert (mine.size, mine.stop, mine.nfc) == (ROWS, PIECES, True)
    for text in [*(ugly(40, seed) for seed in range(100)), ugly(30_000, 7)]:
        assert mine.encode(text) == peer.encode(text, add_special_tokens=False).ids
        assert mine.decode(mine.encode(text)) == unicodedata.normalize("NFC", text)
    assert len(text) > 5 * text_module.CHUNK, "the last one is cut"


def test_long_texts_are_cut_where_it_does_not_show(folder, peer, monkeypatch):
    mine = read_tokenizer(folder, ROWS)
    text = unicodedata.normalize("NFC", "".join(ugly(3, i).replace(" " * 300, "").replace("a" * 300, "") + " word2\n"
                                                for i in range(1500)))
    monkeypatch.setattr(text_module, "CHUNK", 400)
    parts = list(text_module._parts(text))
    assert "".join(parts) == text and len(parts) > 50 and max(map(len, parts)) <= 400
    assert all(part[-1].isalnum() and after[0] in " \n" for part, after in zip(parts, parts[1:], strict=False))
    assert mine.encode(text) == peer.encode(text, add_special_tokens=False).ids


def test_a_million_of_one_character_does_no_harm(folder):
    mine = read_tokenizer(folder, ROWS)
    for run in (" " * 1_000_001, "a" * 100_000):
        assert mine.decode(mine.encode(run)) == run


def test_a_pattern_that_backtracks_without_end_is_one_line():
    tokenizer = TextTokenizer({bytes([value]): value for value in range(256)}, r"(a|aa)+(?!c)b|[\s\S]")
    assert len(tokenizer.encode("ab" * 60)) == 120
    with pytest.raises(UserError, match="does not get through a text of 60 characters"):
        tokenizer.encode("a" * 60)


def test_a_heap_of_marks_is_put_in_order_and_soon(folder):
    mine, draw = read_tokenizer(folder, ROWS), random.Random(2)
    marks = [chr(c) for c in range(0x30000) if unicodedata.combining(chr(c))]
    for count in (3, 999, 1500):
        text = "".join(draw.choice("e\u00e9!\u1100") + "".join(draw.choices(marks, k=count)) for _ in range(4))
        assert mine.normalise(text) == unicodedata.normalize("NFC", text)
    began = time.perf_counter()
    mine.normalise("e" + "\u0301\u0323" * 100_000)
    assert time.perf_counter() - began < 5, "half a minute by insertion"


def test_added_tokens_are_only_text_and_padding_is_nothing(folder, peer):
    mine = read_tokenizer(folder, ROWS)
    for text in (*ADDED, "<think>", "a<|im_start|>user\n"):
        assert max(mine.encode(text)) < PIECES <= max(peer.encode(text).ids)
        assert mine.decode(mine.encode(text)) == text
    assert mine.decode([PIECES, ROWS - 1, *mine.encode("dog"), ROWS + 5]) == "dog"
    vocabulary = Tokenizers(mine, {}).vocab
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    assert vocabulary.in_use().nonzero()[0].tolist() == [*range(PIECES), *range(ROWS, ROWS + 7)]
    assert Grammar(vocabulary, budget=3).legal == (range(PIECES), range(ROWS, ROWS + 1)), "no row without a piece"


def swap_ids(data):
    vocab = data["model"]["vocab"]
    one, two = (next(piece for piece, id in vocab.items() if id == wanted) for wanted in (300, 900))
    vocab[one], vocab[two] = vocab[two], vocab[one]


def unreachable(data):
    """The first merge made the last one: pieces that are made of its result come before it."""
    data["model"]["merges"].append(data["model"]["merges"].pop(0))


def rival(data):
    """`xqj` by (x, qj), with (x, q) made before: on `xqj` alone, (x, q) comes first."""
    ids = iter(range(PIECES + 10, ROWS))
    for left, right in (("q", "j"), ("x", "q"), ("x", "qj")):
        data["model"]["vocab"][left + right] = next(ids)
        data["model"]["merges"].append([left, right])
    data["model"]["merges"][-3:-1] = data["model"]["merges"][-3:-1][::-1]
    data["model"]["vocab"]["xq"], data["model"]["vocab"]["qj"] = PIECES + 10, PIECES + 11


@pytest.mark.parametrize("change, message", [
    (swap_ids, "order of merges"),
    (unreachable, "made of earlier ones"),
    (rival, "not what its own bytes are merged to"),
    (lambda data: data.update(normalizer={"type": "Lowercase"}), "normalizer"),
    (lambda data: data.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
     "normalizer"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(), "pre_tokenizer"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre_tokenizer"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}), "cannot be used"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{L}+"}), "leaves characters"),
    (lambda data: data["model"].update(type="Unigram"), "model.type"),
    (lambda data: data["model"].update(ignore_merges=True), "ignore_merges"),
    (lambda data: data["model"]["vocab"].pop("a"), "model.merges"),
    (lambda data: data["model"]["vocab"].update({"\u4e2d": 5}), "no piece of byte-level"),
    (lambda data: data["model"]["vocab"].update(xyz="7"), "the id of"),
    (lambda data: data["model"]["vocab"].update({list(data["model"]["vocab"])[-1]: ROWS}), "id is too large"),
    (lambda data: data["model"]["merges"].append(["a"]), "cannot be used"),
    (lambda data: data.update(model=[]), "model is missing"),
    (lambda data: data.pop("pre_tokenizer"), "pre_tokenizer is missing"),
])
def test_a_tokenizer_that_cannot_be_represented_is_one_line(folder, change, message):
    edit(folder / "tokenizer.json", change)
    with pytest.raises(UserError) as error:
        read_tokenizer(folder, ROWS)
    assert message in str(error.value) and "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


def test_what_is_not_refused_merges_as_hugging_face_does(tmp_path):
    """Random lists of merges, most of which no training makes: whatever is accepted gives the same ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    draw, accepted = random.Random(1), 0
    letters = {character: value for value, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    for _ in range(80):
        vocab, pieces, merges = dict(letters), ["a", "b"], []
        for _ in range(draw.randrange(2, 12)):
            pair = draw.choice(pieces), draw.choice(pieces)
            if pair not in merges:
                merges.append(pair)
                if "".join(pair) not in vocab:
                    vocab["".join(pair)] = len(vocab)
                    pieces.append("".join(pair))
        theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        theirs.save(str(tmp_path / "tokenizer.json"))
        try:
            mine = read_tokenizer(tmp_path, 400)
        except UserError:
            continue
        accepted += 1
        for _ in range(40):
            text = "".join(draw.choice("aab") for _ in range(draw.randrange(1, 20)))
            assert mine.encode(text) == theirs.encode(text).ids, (merges, text)
    assert 20 < accepted < 80


def test_added_tokens_may_come_first(tmp_path, peer):
    """As a tokenizer that was trained with them has it: in the list of pieces, before the bytes."""
    data = json.loads(peer.to_str())
    data["added_tokens"] = [token | {"id": id, "content": f"<{id} \u4e2d>"} for id, token in
                            enumerate(data["added_tokens"])]
    data["model"]["vocab"] = {token["content"]: token["id"] for token in data["added_tokens"]} | {
        piece: id + 4 for piece, id in data["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    theirs, mine = type(peer).from_file(str(tmp_path / "tokenizer.json")), read_tokenizer(tmp_path, ROWS)
    mine = TextTokenizer.from_json(mine.to_json())
    assert mine.encode(ugly(300)) == theirs.encode(ugly(300)).ids
    assert mine.decode([0, 3, *mine.encode("dog")]) == "dog" and mine.stop == PIECES + 4


def test_merges_as_strings_are_the_same(folder):
    before = read_tokenizer(folder, ROWS).to_json()
    edit(folder / "tokenizer.json", lambda data: data["model"].update(
        merges=[" ".join(pair) for pair in data["model"]["merges"]]))
    assert read_tokenizer(folder, ROWS).to_json() == before
