"""Whatever legal ids are picked, a reply decodes: whole pictures, whole columns of sound, closed spans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onevocab.common.errors import UserError
from onevocab.tokenizers.document import split_segments
from onevocab.tokenizers.grammar import Grammar
from onevocab.tokenizers.vocabulary import Vocabulary

VOCAB = Vocabulary.build(50, [
    {"name": "image", "sizes": 6, "codes": 16, "rows": 0},
    {"name": "audio", "sizes": 0, "codes": 12, "rows": 3},
    {"name": "depth", "sizes": 4, "codes": 5, "rows": 0},
])
GRIDS = [(2, 2), (2, 3), (4, 2), (6, 6)]


def walk(grammar: Grammar, pick) -> list[int]:
    """A reply made of legal ids; `pick(ids)` chooses among them."""
    ids = []
    while not grammar.done:
        legal = [id for part in grammar.legal for id in part]
        assert legal and grammar.run >= 1
        assert (grammar.forced == legal[0]) == (len(legal) == 1)
        last = grammar.last
        here, run = grammar.legal, grammar.run
        for step in range(run):
            assert grammar.legal == here and grammar.run == run - step
            ids.append(pick([id for part in grammar.legal for id in part]))
            grammar.accept(ids[-1])
        assert last is None or grammar.done
    assert grammar.legal == ()
    return ids


def decode(ids: list[int]):
    return split_segments(np.array(ids, np.int32), VOCAB, lambda text: "".join(chr(65 + id) for id in text))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["any", "text", "image", "audio", "depth"]), st.integers(1, 90),
       st.randoms(use_true_random=False), st.booleans())
def test_whatever_is_picked_decodes(want, budget, random, eager):
    grids = {"image": GRIDS, "depth": [(1, 4), (3, 3)]}
    try:
        grammar = Grammar(VOCAB, want, grids, budget)
    except UserError:
        assert budget < {"image": 8, "audio": 5, "depth": 8}[want]
        return

    def pick(legal):
        begins = [id for id in legal if id in VOCAB.span_of_begin]
        return random.choice(begins if eager and begins else legal)

    ids = walk(grammar, pick)
    if ids[-1] == VOCAB.end_of_turn:
        assert want in ("any", "text")
        ids.pop()
    assert len(ids) <= budget
    parts = decode(ids)
    for name, content in parts:
        if name in grids:
            assert content.shape in grids[name]
        elif name == "audio":
            assert content.shape[0] >= 1 and content.shape[1] == VOCAB.spans["audio"].rows
    if want == "text":
        assert all(name == "text" for name, _ in parts)
    elif want != "any":
        assert [name for name, _ in parts] == [want]


def test_sound_closes_at_the_budget_at_the_latest():
    audio = VOCAB.spans["audio"]
    ids = walk(Grammar(VOCAB, "audio", (), 13), min)  # the end is the greatest: never chosen freely
    assert len(ids) == 11 and ids[-1] == audio.end  # begin, 3 columns, end; a fourth column would take 14
    assert len(walk(Grammar(VOCAB, "audio", (), 14), min)) == 14


def test_after_a_column_one_slice_holds_codes_and_end():
    grammar, audio = Grammar(VOCAB, "audio", (), 20), VOCAB.spans["audio"]
    for id in (audio.begin, *[audio.codes_start] * 3):
        grammar.accept(id)
    assert grammar.legal == (range(audio.codes_start, audio.end + 1),)


def test_text_and_the_end_of_turn_are_one_slice():
    assert Grammar(VOCAB, "text", (), 5).legal == (range(0, VOCAB.end_of_turn + 1),)
    other_end = Grammar(VOCAB, "text", (), 5, end=VOCAB.end_of_document)
    assert other_end.legal == (range(0, 50), range(VOCAB.end_of_document, VOCAB.end_of_document + 1))
    other_end.accept(VOCAB.end_of_document)
    assert other_end.done


def test_only_sizes_that_fit_are_offered():
    image = VOCAB.spans["image"]
    grammar = Grammar(VOCAB, "image", GRIDS, 11)  # 6x6 takes 40, 4x2 takes 12
    grammar.accept(image.begin)
    assert grammar.forced == image.size_id(2)
    grammar.accept(image.size_id(2))
    assert grammar.legal == (range(image.size_id(2), image.size_id(3) + 1),)
    grammar.accept(image.size_id(3))
    assert grammar.run == 6


def test_misuse_is_named():
    with pytest.raises(UserError, match="no room for 'image': it takes at least 8 more tokens and 7 are"):
        Grammar(VOCAB, "image", GRIDS, 7)
    with pytest.raises(UserError, match="choose any, text, image, audio"):
        Grammar(VOCAB, "smell", GRIDS, 70)
    with pytest.raises(UserError, match="none of the sizes"):
        Grammar(VOCAB, "image", [(9, 9)], 700)
    with pytest.raises(UserError, match="no room for 'text'"):
        Grammar(VOCAB, "text", GRIDS, 0)
    grammar = Grammar(VOCAB, "text", GRIDS, 5)
    with pytest.raises(ValueError, match="not legal"):
        grammar.accept(VOCAB.user)
