"""Packing, order and batches: properties, and a batch checked by brute force."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    as_json,
    grid,
    image,
    mixed_codes,
    sample,
    say,
    text,
    write_codes,
)

from onevocab.common.errors import UserError
from onevocab.data.codes import tokenize_shards
from onevocab.data.documents import codes_document
from onevocab.data.loader import LoaderConfig, LossWeights, PackedLoader
from onevocab.data.packing import pack
from onevocab.data.shards.format import (
    codes_to_npy,
    list_shards,
    read_shard,
)
from onevocab.data.source import Source
from onevocab.tokenizers.document import Document, Segment

# ------------------------------------------------------------------------------------------------ packing


@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 32))
def test_packing_loses_nothing_and_cuts_nothing(lengths, seq_len):
    packed = pack(lengths, seq_len)
    placed = [i for row in packed.rows for i in row]
    assert sorted(placed + packed.dropped) == [i for i, n in enumerate(lengths) if n]
    assert packed.dropped == [i for i, n in enumerate(lengths) if n > seq_len]
    sums = [sum(lengths[i] for i in row) for row in packed.rows]
    assert all(0 < n <= seq_len for n in sums)
    # No two rows could be joined: less than half of the places is wasted, whatever the lengths.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > seq_len
    assert packed == pack(lengths, seq_len)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 4096).astype(int).clip(5, 2048)
    assert lengths.sum() / (len(pack(lengths, 2048).rows) * 2048) > 0.99


# ------------------------------------------------------------------------------------------------ loader


@pytest.fixture(scope="module")
def codes(tmp_path_factory, tokenizers):
    return write_codes(tmp_path_factory.mktemp("codes"), tokenizers, mixed_codes(60))


CONFIG = LoaderConfig(seq_len=128, global_batch_size=4, window=16, condition_dropout=0.3)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63), start=st.integers(0, 30), world=st.sampled_from([1, 2, 4]))
def test_global_sequence_is_the_same_for_any_world_and_restart(codes, tokenizers, seed, start, world):
    whole = PackedLoader(codes, tokenizers, CONFIG, seed=seed)
    for _ in range(start):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))
    ranks = [PackedLoader(codes, tokenizers, CONFIG, rank, world, seed) for rank in range(world)]
    for loader in ranks:
        loader.load_state_dict(state)
    for _ in range(3):
        expected, parts = whole.next_batch(), [loader.next_batch() for loader in ranks]
        joined = type(expected)(*(torch.cat(values) for values in zip(*(vars(p).values() for p in parts), strict=True)))
        assert same(expected, joined)
    assert all(loader.state_dict() == whole.state_dict() for loader in ranks)


def test_state_of_other_data_is_refused(codes, tokenizers):
    state = PackedLoader(codes, tokenizers, CONFIG).state_dict()
    for other in (PackedLoader(codes, tokenizers, CONFIG, seed=1),
                  PackedLoader(str(codes / "s-00000[0-3].tar"), tokenizers, CONFIG),
                  PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"window": 17}))):
        with pytest.raises(UserError, match="not those of the checkpoint"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        PackedLoader(codes, tokenizers, CONFIG, world=3)


def test_every_epoch_shows_every_document_once_in_another_order(codes, tokenizers):
    loader = PackedLoader(codes, tokenizers, CONFIG)
    epochs = [[loader.rows(epoch, w) for w in range(loader.windows)] for epoch in range(3)]
    orders = [[entry[0] for window in windows for row in window for entry in row] for windows in epochs]
    assert loader.too_long == 0 and loader.windows == 4
    assert all(sorted(order) == list(range(60)) for order in orders)
    plans = [loader.plan(epoch)[0].tolist() for epoch in range(3)]
    assert plans[0] != plans[1] != plans[2] != plans[0]
    # The steps take these rows, one after another: none lost, none twice.
    stream = [row for windows in epochs for window in windows for row in window]
    taken = [row for _ in range(len(stream) // 3) for row in loader._next_rows()]
    assert taken[: len(stream)] == stream


def test_repeats_and_weights(tmp_path, tokenizers):
    for name, n in (("a", 10), ("b", 30)):
        write_codes(tmp_path / name, tokenizers, mixed_codes(n))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def counts(*sources, epoch=0):
        loader = PackedLoader(sources, tokenizers, CONFIG)
        return Counter(loader.plan(epoch)[0].tolist())

    shown = [counts(Source(path=a, repeat=2.5, valid=0), Source(path=b, repeat=0.5, valid=0), epoch=epoch)
             for epoch in range(4)]
    for epoch in shown:
        assert sum(epoch[i] for i in range(10)) == 25 and {epoch[i] for i in range(10)} == {2, 3}
        assert sum(epoch[i] for i in range(10, 40)) == 15 and max(epoch[i] for i in range(10, 40)) == 1
    assert shown[0] != shown[1]
    weighted = counts(Source(path=a, weight=3, valid=0), Source(path=b, weight=1, valid=0))
    assert sum(weighted.values()) == 40 and sum(weighted[i] for i in range(10)) == 30
    with pytest.raises(UserError, match="weight"):
        counts(Source(path=a, weight=3), Source(path=b))


def test_both_orders_and_condition_dropout(codes, tokenizers, tmp_path):
    """Every stored document against the same document written out and encoded anew."""
    loader = PackedLoader(codes, tokenizers, CONFIG)
    shown, documents = set(), [codes_document(s) for shard in list_shards(codes) for s in read_shard(shard)]
    for epoch in range(6):
        for number, swapped, dropped, wording in zip(*(values.tolist() for values in loader.plan(epoch)), strict=True):
            assert wording == -1
            segments, kind = list(documents[number].segments), number % 5
            if kind in (0, 1):
                first, second = segments[::-1] if swapped else segments
                if dropped:
                    assert first.modality == "text" and second.modality in ("image", "audio")
                    first = Segment("text", "")
                segments = [Segment(first.modality, first.content, loss=False), second]
            elif dropped:
                assert kind == 2  # user asks, assistant draws
                segments = [Segment("text", "", "user", 0, False), segments[1]]
            expected = tokenizers.encode(Document(tuple(segments)))
            ids, loss = loader.tokens_of(number, swapped, dropped)
            assert ids.tolist() == expected.ids.tolist() and loss.tolist() == expected.loss_mask.tolist()
            shown.add((number, swapped, dropped))
    kinds = {(number % 5, swapped, dropped) for number, swapped, dropped in shown}
    assert kinds == {(0, False, False), (0, True, False), (0, True, True), (1, False, False), (1, True, False),
                     (1, False, True), (2, False, False), (2, False, True), (3, False, False), (4, False, False)}
    # Over six epochs each pair came in both orders.
    assert all({s for n, s, _ in shown if n == number} == {False, True} for number in range(60) if number % 5 < 2)
    always = PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"text_first": 1.0, "condition_dropout": 1.0}))
    numbers, swapped, dropped, _ = always.plan(0)
    assert (swapped == (numbers % 5 == 0)).all() and (dropped == np.isin(numbers % 5, (0, 1, 2))).all()


def test_only_the_request_before_a_drawing_is_dropped(tmp_path, tokenizers):
    messages = [say("system", text("be kind")), say("user", image("0.image.npy"), text("what?")),
                say("assistant", text("a dog")), say("user", image("0.image.npy"), text("make it grey")),
                say("assistant", text("here: "), image("1.image.npy")), say("user", text("thanks")),
                say("user", image("0.image.npy"))]
    write_codes(tmp_path, tokenizers, [{"json": as_json({"messages": messages}), "0.image.npy": grid(0),
                                        "1.image.npy": grid(1)}])
    loader = PackedLoader(tmp_path, tokenizers, CONFIG.model_copy(update={"seq_len": 256}))
    ids, loss = loader.tokens_of(0, False, True)
    messages[3]["content"][1]["text"] = ""
    members = {"json": as_json({"messages": messages}), "0.image.npy": grid(0), "1.image.npy": grid(1)}
    expected = tokenizers.encode(codes_document(sample(members)))
    assert ids.tolist() == expected.ids.tolist() and loss.tolist() == expected.loss_mask.tolist()


def test_batch_by_brute_force(codes, tokenizers):
    vocab, weights = tokenizers.vocab, LossWeights(text=2.0, image=0.5, audio=3.0, context_weight=0.1)
    loader = PackedLoader(codes, tokenizers, CONFIG.model_copy(update={"loss": weights}))
    table = (weights.text, weights.image, weights.audio)
    useful = 0
    for _ in range(5):
        before = SimpleNamespace(**{k.strip("_"): v for k, v in loader.state_dict().items()})
        rows = loader._next_rows()
        loader.load_state_dict(vars(before))
        batch = loader.next_batch()
        assert batch.ids.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
        assert (batch.loss_weights.dtype, batch.modality.dtype, batch.document_ids.dtype) == (
            torch.float32, torch.uint8, torch.int32)
        for r, row in enumerate(rows):
            at = 0
            for d, entry in enumerate(row):
                ids, loss = loader.tokens_of(*entry)
                for i, token in enumerate(ids.tolist()):
                    assert batch.ids[r, at] == token and batch.positions[r, at] == i and batch.document_ids[r, at] == d
                    if i + 1 < len(ids):
                        modality = vocab.modality_of(ids[i + 1])
                        assert batch.targets[r, at] == ids[i + 1] and batch.modality[r, at] == modality
                        expected = table[modality] * (1.0 if loss[i + 1] else weights.context_weight)
                        assert batch.loss_weights[r, at].item() == pytest.approx(expected)
                    else:
                        assert batch.loss_weights[r, at] == 0
                    at += 1
                    useful += 1
            assert (batch.document_ids[r, at:] == -1).all() and (batch.loss_weights[r, at:] == 0).all()
            assert (batch.ids[r, at:] == vocab.pad).all()
    assert useful > 0.75 * 5 * 4 * 128


def test_bad_samples_leave_their_position_empty(tmp_path, tokenizers):
    samples = list(mixed_codes(20))
    samples[3] = {"json": as_json({"content": [image("9.image.npy")]})}
    samples[7] = {"json": as_json({"content": [text("")]})}
    samples[11] = {**samples[0], "0.image.npy": codes_to_npy(np.full((4, 4), 99), 100)}
    samples[12] = {"json": as_json({"messages": [say("user", text("word " * 500)), say("assistant", text("a"))]})}
    write_codes(tmp_path, tokenizers, samples)
    with pytest.raises(UserError, match="3 of 20 samples are bad"):
        PackedLoader(tmp_path, tokenizers, CONFIG)
    loader = PackedLoader(tmp_path, tokenizers, CONFIG, max_bad_fraction=0.2)
    assert loader.summary()["bad"] == 3 and loader.too_long == 1 and loader.epoch_length == 20
    shown = {entry[0] for w in range(loader.windows) for row in loader.rows(0, w) for entry in row}
    assert shown == set(range(20)) - {3, 7, 11, 12}
    with pytest.raises(UserError, match="no document fits a row of 8"):
        PackedLoader(write_codes(tmp_path / "media", tokenizers, samples[:3]), tokenizers, LoaderConfig(seq_len=8))


def test_raw_shards_give_the_same_batches_as_their_codes(raw, tmp_path, tokenizers):
    tokenize_shards(raw, tmp_path, tokenizers, batch=3, progress=False)
    config = CONFIG.model_copy(update={"seq_len": 160})
    a, b = PackedLoader(raw, tokenizers, config), PackedLoader(tmp_path, tokenizers, config)
    assert all(same(a.next_batch(), b.next_batch()) for _ in range(4))
