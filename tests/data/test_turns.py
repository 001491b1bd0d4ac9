"""Captions as conversations: every document as it is shown, against the same conversation encoded as a prompt is."""

from collections import Counter

import numpy as np
import pytest
from samples import as_json, audio, grid, image, mixed_codes, say, text, write_codes
from test_loader import CONFIG, same

from onevocab.common.errors import UserError
from onevocab.data.documents import codes_document
from onevocab.data.held_out import limits, read_limits, together, write_limits
from onevocab.data.loader import PackedLoader
from onevocab.data.shards.format import list_shards, read_shard
from onevocab.data.source import Source
from onevocab.data.token_cache import HASHES
from onevocab.data.turns import WordingsFile
from onevocab.tokenizers.document import conversation

WORDS = ["a red apple", "two dogs.", "é 漢字", " spaced", "7 birds"]


def captioned(n: int):
    """Pictures and sounds with captions, the text first or last; a picture, a sound and a caption; two that have no
    turns: a picture alone, and a picture with a sound."""
    for i in range(n):
        words = f"{WORDS[i % 5]} {i}"
        media = {"0.image.npy": grid(i), "1.audio.npy": grid(i, (1 + i % 3, 2))}
        parts = [[image("0.image.npy"), text(words)], [text(words), audio("1.audio.npy")],
                 [image("0.image.npy"), audio("1.audio.npy"), text(words)],
                 [text(words), image("0.image.npy"), audio("1.audio.npy")],
                 [image("0.image.npy")], [image("0.image.npy"), audio("1.audio.npy")]][i % 6]
        used = {part["file"] for part in parts if "file" in part}
        yield {"json": as_json({"content": parts}), **{name: media[name] for name in used}}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizers):
    return write_codes(tmp_path_factory.mktemp("pairs"), tokenizers, captioned(36))


def expected(document, made: bool, dropped: bool, request: str):
    """The conversation that a captioned document is shown as."""
    media = [(segment.modality, segment.content) for segment in document.media]
    [words] = [segment.content for segment in document.segments if segment.modality == "text"]
    if made:
        asked = [] if dropped else [("text", request.replace("{caption}", words))]
        return conversation([("user", asked), ("assistant", media)])
    return conversation([("user", [*media, ("text", request)]), ("assistant", [("text", words)])])


def test_both_directions_are_the_templates_own(pairs, tokenizers):
    source = Source(path=str(pairs), turns="captions", valid=0)
    loader = PackedLoader(source, tokenizers, CONFIG.model_copy(update={"seq_len": 256}))
    documents = [codes_document(s) for shard in list_shards(pairs) for s in read_shard(shard)]
    wordings, shown = WordingsFile(), Counter()
    for epoch in range(8):
        for entry in zip(*(values.tolist() for values in loader.plan(epoch)), strict=True):
            number, swapped, dropped, wording = entry
            document, kind = documents[number].normalised(), number % 6
            if kind > 3:
                assert wording == -1
                continue
            made = swapped == (kind in (0, 2))
            own = wordings.any if kind > 1 else (wordings.image, wordings.audio)[kind]
            request = (own.make if made else own.describe)[wording]
            right = tokenizers.encode(expected(document, made, dropped, request))
            ids, loss = loader.tokens_of(*entry)
            assert ids.tolist() == right.ids.tolist() and loss.tolist() == right.loss_mask.tolist()
            shown[kind, made, dropped, wording] += 1
    # Both directions of every kind, each with each of its requests, and the words dropped before a medium alone.
    for kind in range(4):
        own = wordings.any if kind > 1 else (wordings.image, wordings.audio)[kind]
        assert {w for k, made, _, w in shown if k == kind and made} == set(range(len(own.make)))
        assert {w for k, made, _, w in shown if k == kind and not made} == set(range(len(own.describe)))
    assert {dropped for _, made, dropped, _ in shown if made} == {True, False}
    assert not any(dropped for _, made, dropped, _ in shown if not made)
    summary = loader.summary()
    assert summary["captions_with_turns"] == 24 and summary["without_turns"] == 12


def test_lengths_order_and_restart(pairs, tokenizers):
    source = Source(path=str(pairs), turns="captions", valid=0)
    whole = PackedLoader(source, tokenizers, CONFIG, seed=3)
    whole.next_batch()
    rows = [row for window in range(whole.windows) for row in whole.rows(0, window)]
    lengths = [sum(len(whole.tokens_of(*entry)[0]) for entry in row) for row in rows]
    assert max(lengths) <= CONFIG.seq_len and sorted(entry.document for row in rows for entry in row) == [*range(36)]
    ranks = [PackedLoader(source, tokenizers, CONFIG, rank, 2, 3) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(whole.state_dict())
    batch, parts = whole.next_batch(), [loader.next_batch() for loader in ranks]
    assert all((column == np.concatenate([vars(part)[name] for part in parts])).all()
               for name, column in vars(batch).items())
    share = PackedLoader(source, tokenizers, CONFIG.model_copy(update={"text_first": 1.0}))
    _, swapped, _, wording = share.plan(0)
    assert (swapped == share._text_second[share.plan(0)[0]])[wording >= 0].all()
    # What fits a row as it is, but not with the longest request, is left out and counted.
    length = max(lengths)
    short = CONFIG.model_copy(update={"seq_len": int(whole._cache.length.max())})
    tight = PackedLoader(source, tokenizers, short)
    assert tight.too_long > 0 == PackedLoader(Source(path=str(pairs), valid=0), tokenizers, short).too_long
    assert length > short.seq_len


def test_chosen_where_instruct_has_no_conversation(pairs, tmp_path, tokenizers):
    def asks(*sources, instruct=True):
        return PackedLoader(sources, tokenizers, CONFIG, instruct=instruct).asks

    source = Source(path=str(pairs))
    mixed = Source(path=str(write_codes(tmp_path, tokenizers, mixed_codes(10))))
    assert asks(source) == [True] and asks(source, instruct=False) == [False]
    assert asks(source, mixed) == [False, False]
    assert asks(source.model_copy(update={"turns": "captions"}), mixed) == [True, False]
    assert asks(source.model_copy(update={"turns": "as_is"})) == [False]
    # What is said of conversations holds beside captions: they stay as they are.
    loader = PackedLoader([source.model_copy(update={"turns": "captions"}), mixed], tokenizers, CONFIG)
    documents, _, _, wording = loader.plan(0)
    assert set(wording[documents >= 36][documents[documents >= 36] % 5 == 1].tolist()) <= {-1}


def test_wordings_of_a_file(pairs, tmp_path, tokenizers):
    file = tmp_path / "my.toml"
    file.write_text('[image]\nmake = ["{caption}, bitte"]\n')
    source = Source(path=str(pairs), turns="captions", wordings=str(file), valid=0)
    loader, built_in = (PackedLoader(one, tokenizers, CONFIG) for one in (source, replace_wordings(source, None)))
    assert loader.fingerprint != built_in.fingerprint
    with pytest.raises(UserError, match="not those of the checkpoint"):
        loader.load_state_dict(built_in.state_dict())
    for entry in zip(*(values.tolist() for values in loader.plan(0)), strict=True):
        if entry[0] % 6 == 0 and entry[1] and not entry[2]:
            user = tokenizers.decode(loader.tokens_of(*entry)[0]).segments[0]
            assert user.content == f"{WORDS[entry[0] % 5]} {entry[0]}, bitte"
    for content, message in (("[image", "not valid TOML"), ('[image]\nmake = ["Draw"]', "image.make"),
                             ('[smell]\nmake = ["{caption}"]', "smell: unknown key"), ("[image]\nmake = []", "make"),
                             ('[image]\ndescribe = [" "]', "must be a request")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            PackedLoader(source, tokenizers, CONFIG)
    with pytest.raises(UserError, match="cannot read"):
        PackedLoader(replace_wordings(source, str(tmp_path / "none")), tokenizers, CONFIG)


def replace_wordings(source, path):
    return source.model_copy(update={"wordings": path})


# ------------------------------------------------------------------------------------------------ held out


def hashes(loader, documents) -> set[int]:
    return set(loader._cache.hash[documents].tolist())


def test_what_is_held_out_is_never_trained_on(tmp_path, tokenizers):
    samples = [sample for sample in captioned(300) if b"audio" not in sample["json"]]
    again = [{**sample, "json": sample["json"].replace(b"apple", b"pear")} for sample in samples[::2]]
    codes = write_codes(tmp_path / "codes", tokenizers, samples + again + [say_so(i) for i in range(60)])
    loader = PackedLoader(Source(path=str(codes)), tokenizers, CONFIG)
    total, held = len(loader._cache), len(loader._held)
    assert 0.03 * total < held < 0.2 * total and loader.summary()["held_out"] == held
    trained = {entry.document for epoch in range(2) for w in range(loader.windows) for row in loader.rows(epoch, w)
               for entry in row}
    assert len(trained) == total - held and not trained & set(loader._held.tolist())
    # Another caption of the same picture is held out with it.
    assert not hashes(loader, sorted(trained)) & hashes(loader, loader._held)
    half, none = (PackedLoader(Source(path=str(codes), valid=share), tokenizers, CONFIG) for share in (0.5, 0))
    assert set(loader._held.tolist()) < set(half._held.tolist()) and not len(none._held) and none.held_out(8) == []
    assert none.fingerprint != loader.fingerprint != half.fingerprint
    # One that two sources read is held out in both.
    both = PackedLoader([Source(path=str(codes), valid=0.5), Source(path=str(codes), valid=0)], tokenizers, CONFIG)
    assert [len(part) for part in both._trained] == [len(half._trained[0])] * 2
    apart = write_codes(tmp_path / "apart", tokenizers, samples[:5])
    own = PackedLoader(Source(path=str(codes), valid_path=str(apart)), tokenizers, CONFIG)
    assert own._counts == [total] and own._held.tolist() == [*range(total, total + 5)]
    shared = PackedLoader([Source(path=str(codes), valid_path=str(apart))] * 2, tokenizers, CONFIG)
    assert shared.summary()["held_out"] == 10, "two sources may name the same shards"
    with pytest.raises(UserError, match="trained on as well"):
        PackedLoader([Source(path=str(codes)), Source(path=str(apart), valid_path=str(codes))], tokenizers, CONFIG)
    with pytest.raises(ValueError, match="both set"):
        Source(path="x", valid=0.1, valid_path="y")


def test_what_another_stage_trains_on_is_not_measured(tmp_path, tokenizers):
    """A small source holds out a larger share than the whole that an earlier stage read."""
    run = tmp_path / "run"
    parts = [write_codes(run / "codes" / name, tokenizers, [say_so(i) for i in range(start, start + 900)])
             for name, start in (("a", 0), ("b", 900))]
    whole = PackedLoader([Source(path=str(part), valid=0.02) for part in parts], tokenizers, CONFIG)
    write_limits(run, "pretrain", together(whole.limits))
    run.rename(tmp_path / "moved")  # a run may move
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    small = PackedLoader(Source(path=str(tmp_path / "link" / "codes" / "b"), valid=0.2), tokenizers, CONFIG)
    before, trained = hashes(small, small._held), hashes(whole, np.concatenate(whole._trained))
    assert before & trained
    dropped = small.measure_below(read_limits(tmp_path / "moved", ("instruct", "pretrain")))
    assert len(small._held) + dropped == len(before) and 5 < len(small._held) < 60
    assert not hashes(small, small._held) & trained and len(small._trained[0]) == 900 - len(before)
    phase = PackedLoader(Source(path=str(tmp_path / "moved" / "codes" / "b"), valid=0.001), tokenizers, CONFIG)
    assert small.measure_below(together(phase.limits)) and not hashes(small, small._held) & hashes(
        phase, phase._trained[0])


def say_so(i: int) -> dict:
    return {"json": as_json({"messages": [say("user", text(f"{i}?")), say("assistant", text(str(i)))]})}


def test_held_out_batches_are_the_same_for_all_ranks_and_times(pairs, tokenizers):
    source = Source(path=str(pairs), turns="captions", valid=0.5)
    config = replace_config(global_batch_size=4)
    loader = PackedLoader(source, tokenizers, config)
    batches = loader.held_out(8)
    assert all(same(a, b) for a, b in zip(batches, loader.held_out(8), strict=True))
    state = loader.state_dict()
    assert state == PackedLoader(source, tokenizers, config).state_dict()

    def documents(some) -> Counter:
        found: Counter = Counter()
        for batch in some:
            for ids, owner in zip(batch.ids.tolist(), batch.document_ids.tolist(), strict=True):
                for number in set(owner) - {-1}:
                    found[tuple(i for i, d in zip(ids, owner, strict=True) if d == number)] += 1
        return found

    ranks = [PackedLoader(source, tokenizers, config, rank, 4).held_out(8, micro_batch_size=2) for rank in range(4)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sum((documents(rank) for rank in ranks), Counter()) == documents(batches)
    few = loader.held_out(1)
    assert sum(len(batch.ids) for batch in few) == 1 and documents(few) <= documents(loader.held_out(100))
    assert documents(loader.held_out(100)).total() == len(loader._held)


def replace_config(**changes):
    return CONFIG.model_copy(update=changes)


def test_samples_that_look_alike_are_not_all_held_out():
    crowd = np.full(100, 5, np.int64)
    assert limits([0.1], [False], [["a"]], [crowd], []) == {"a": 5}  # none is below
    some = np.array([*range(4), *crowd])
    assert np.count_nonzero(some < limits([0.1], [False], [["a"]], [some], [])["a"]) == 4
    even = np.linspace(0, HASHES - 1, 50).astype(np.int64)
    assert np.count_nonzero(even < limits([None], [False], [["a"]], [even], [])["a"]) == 5  # a tenth of few
    many = np.linspace(0, HASHES - 1, 20_000).astype(np.int64)
    assert np.count_nonzero(many < limits([None], [False], [["a"]], [many], [])["a"]) == 200  # 1% of many
    some = np.linspace(0, HASHES - 1, 3000).astype(np.int64)
    assert np.count_nonzero(some < limits([None], [False], [["a"]], [some], [])["a"]) == 64
    assert limits([None], [False], [["a"]], [even[:9]], []) == {"a": 0}  # a tenth of nine is none
