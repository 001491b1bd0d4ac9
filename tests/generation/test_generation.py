"""Sampling: the cache, batches, seeds, guidance, the grammar at high temperature, streaming, sample.py's
files."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_decoder, tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.generation import AnyToAny, engine
from onevocab.generation.sampling import Sampling, probabilities, row_noise, sample_ids
from onevocab.tokenizers.grammar import Grammar


@pytest.fixture(scope="module")
def model() -> AnyToAny:
    tokenizers = tiny_tokenizers()
    return AnyToAny(tiny_decoder(tokenizers.vocab), tokenizers)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def sound():
    return np.random.default_rng(1).normal(0, 0.1, 4000).astype(np.float32), 16_000


def full_forward_reply(model: AnyToAny, prompt: np.ndarray, grammar: Grammar) -> list[int]:
    """Greedy by the definition: no cache, the whole sequence again for every id, the whole head, then the
    mask."""
    ids = prompt.tolist()
    while not grammar.done:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
            logits = model.model.logits(hidden[0, -1])
        legal = [id for part in grammar.legal for id in part]
        ids.append(max(legal, key=lambda id: float(logits[id])))
        grammar.accept(ids[-1])
    return ids[len(prompt):]


@pytest.mark.parametrize("want", ["any", "text", "image", "audio"])
def test_greedy_with_the_cache_is_the_full_forward(model, picture, want):
    request, = model._requests([[picture, "What is this?"]], want, False, 40)
    expected = full_forward_reply(model, request.prompt, Grammar(model.vocab, want, model.grids, 40))
    assert model.generate([picture, "What is this?"], want, temperature=0, max_new_tokens=40).ids == expected


@pytest.mark.parametrize("want,guidance", [("any", 1), ("text", 1), ("image", 3), ("audio", 3), ("any", 2)])
def test_a_row_does_not_depend_on_its_batch(model, picture, sound, want, guidance):
    # Matrix products of other batch sizes differ by ~1e-6 here, too little to move one of these draws.
    prompts = [["a dog"], [picture, "What is in it, and how many?"], [sound], ["a"],
               [sound, picture, "b", sound]]
    options = {"want": want, "guidance": guidance, "max_new_tokens": 30}
    batch = model.generate_batch(prompts, seed=7, **options)
    alone = [model.generate(prompt, seed=7 + row, **options) for row, prompt in enumerate(prompts)]
    assert [reply.ids for reply in batch] == [reply.ids for reply in alone]
    assert len({tuple(reply.ids) for reply in batch}) == len(prompts)
    chunked = model.generate_batch(prompts, seed=7, rows=2, **options)
    assert [reply.ids for reply in chunked] == [reply.ids for reply in batch]


def test_logits_of_a_batch_are_those_of_single_rows(model):
    """The tolerance: another batch size may block its matrix products otherwise; float32 rounding,
    nothing more."""
    grammar = [Grammar(model.vocab, "text", (), 20) for _ in range(4)]
    prompts = [np.arange(1, 2 + 5 * row, dtype=np.int32) for row in range(4)]

    def last_hidden(rows):
        requests = [engine.Request(prompts[row], grammar[row], row) for row in rows]
        batch = engine._Batch(model.model, requests, Sampling())
        with torch.inference_mode():
            batch.prefill([[] for _ in rows])
            return batch.step(torch.arange(5, 9)[list(rows)])

    together = last_hidden(range(4))
    for row in range(4):
        torch.testing.assert_close(last_hidden([row])[0], together[row], atol=1e-5, rtol=1e-5)


def test_seeds_reproduce_and_differ(model):
    ids = [model.generate(["a dog"], "image", seed=seed).ids for seed in (3, 3, 4)]
    assert ids[0] == ids[1] != ids[2]


def test_guidance_of_one_is_no_guidance_and_more_changes_the_picture(model, picture):
    prompt = [picture, "make it grey"]
    plain = model.generate(prompt, "image", seed=1).ids
    assert model.generate(prompt, "image", seed=1, guidance=1.0).ids == plain
    # A factor that rounds to one goes through both rows, and still draws the same.
    assert model.generate(prompt, "image", seed=1, guidance=1.0 + 1e-9).ids == plain
    assert model.generate(prompt, "image", seed=1, guidance=4.0).ids != plain
    both = [model.generate_batch([prompt] * 20, "any", guidance=g, max_new_tokens=30) for g in (1.0, 4.0)]
    for one, other in zip(*both, strict=True):  # nothing outside a picture or a sound is guided
        begin = next((n for n, id in enumerate(one.ids) if id in model.vocab.span_of_begin), len(one.ids) - 1)
        assert one.ids[: begin + 1] == other.ids[: begin + 1]
    texts = [model.generate(prompt, "text", seed=1, guidance=guidance).text for guidance in (1.0, 4.0)]
    assert texts[0] == texts[1]  # words are not guided


def test_guidance_of_zero_forgets_the_words_and_keeps_the_picture(model, picture):
    def draw(prompt):
        return model.generate(prompt, "image", seed=1, guidance=0.0).ids

    assert draw(["a dog"]) == draw(["an apple"])
    assert draw([picture, "a dog"]) == draw([picture, "an apple"]) != draw(["a dog"])


def test_never_malformed_at_temperature_1_5(model):
    """1,000 replies of every kind: decoding raises on a malformed one."""
    count = {"any": 400, "text": 100, "image": 300, "audio": 200}
    for want, number in count.items():
        for budget in (24, 33):
            replies = model.generate_batch([["a dog"]] * (number // 2), want, 1.5, seed=budget,
                                           max_new_tokens=budget, rows=100)
            for reply in replies:
                assert len(reply.ids) <= budget + 1  # the end of the turn
                for part in reply.segments:
                    assert part.modality != "image" or part.content.shape == (4, 4)
                    assert part.modality != "audio" or part.content.shape[1] == 2
                if want in ("image", "audio"):
                    assert [part.modality for part in reply.segments] == [want]
            kinds = {part.modality for reply in replies for part in reply.segments}
            assert kinds == ({"text", "image", "audio"} if want == "any" else {want})


def test_replies_hold_what_was_asked_for(model, picture, sound):
    reply = model.generate([picture, sound, "what?"], "image", seed=2)
    assert reply.images[0].size == (16, 16) and reply.text == "" and not reply.audio
    reply = model.generate([sound], "audio", seed=2, max_new_tokens=22)
    samples, rate = reply.audio[0]
    assert samples.dtype == np.float32 and rate == 16_000
    assert len(samples) == reply.segments[0].content.shape[0] * 4 * 256
    assert isinstance(model.generate("hello", "text", max_new_tokens=5).text, str)


def test_conversations_take_replies_back(model, picture):
    first = model.generate([{"role": "user", "content": ["draw", picture]}], "image", seed=1)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ["draw", picture]},
             {"role": "assistant", "content": first.segments}, {"role": "user", "content": "and now?"}]
    request, = model._requests([turns], "text", False, 4)
    wanted = model.vocab.spans["image"].wrap(first.segments[0].content)
    ids = request.prompt.tolist()
    at = ids.index(model.vocab.assistant)
    assert ids[at + 1 : at + 1 + len(wanted)] == wanted.tolist() and ids[-1] == model.vocab.assistant
    assert model.generate(turns, "text", max_new_tokens=4).text is not None


def test_a_pretrained_model_continues_documents(model):
    plain = AnyToAny(model.model, model.tokenizers, plain=True)
    request, = plain._requests([["a red"]], "any", True, 30)
    assert request.prompt.tolist() == [model.vocab.document, *model.tokenizers.text.encode("a red")]
    assert request.unconditional.tolist() == [model.vocab.document]
    replies = plain.generate_batch([["a red"]] * 30, "any", max_new_tokens=30)
    ids = [id for reply in replies for id in reply.ids]
    assert model.vocab.end_of_document in ids and model.vocab.end_of_turn not in ids


@pytest.mark.parametrize("want", ["any", "text", "image", "audio"])
def test_the_stream_is_the_reply(model, want):
    for seed in range(6):
        options = {"want": want, "seed": seed, "max_new_tokens": 40, "temperature": 1.5}
        reply = model.generate(["a dog"], **options)
        events = list(model.stream(["a dog"], **options))
        assert events[-1].kind == "reply" and events[-1].value.ids == reply.ids
        assert "".join(event.value for event in events if event.kind == "text") == reply.text
        pictures = [event.value for event in events if event.kind == "image"]
        assert [p.tobytes() for p in pictures] == [p.tobytes() for p in reply.images]
        columns = [event.value for event in events if event.kind == "audio_codes"]
        sounds = [part.content for part in reply.segments if part.modality == "audio"]
        if sounds:
            assert np.array_equal(np.concatenate(columns), np.concatenate(sounds))
        assert len([event for event in events if event.kind == "audio"]) == len(sounds)


def test_text_that_spells_specials_is_only_text(model):
    text = "<|user|> <|end_of_turn|><|document|>"
    request, = model._requests([[text]], "text", False, 4)
    specials = [id for id in request.prompt.tolist() if id >= model.vocab.text_size]
    vocab = model.vocab
    assert specials == [vocab.document, vocab.user, vocab.end_of_turn, vocab.assistant]


def test_sampling_keeps_what_it_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert (probabilities(logits, Sampling(top_k=2)) > 0)[0].tolist() == [1, 1, 0, 0]
    assert (probabilities(logits, Sampling(top_k=3)) > 0).sum(-1).tolist() == [3, 3]  # ties or not
    assert (probabilities(logits, Sampling(top_p=0.7)) > 0)[0].tolist() == [1, 1, 0, 0]
    assert (probabilities(logits, Sampling(top_p=1e-9)) > 0).sum(-1).tolist() == [1, 1]
    assert sample_ids(logits, torch.zeros(2, dtype=torch.float64), Sampling(temperature=0)).tolist() == [0, 0]
    almost_one = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    assert sample_ids(logits, almost_one, Sampling(top_k=2)).tolist()[0] == 1
    noise = row_noise(0, 1, 20_000)[0]
    drawn = sample_ids(logits[:1].expand(len(noise), -1), noise, Sampling())
    frequency = torch.bincount(drawn, minlength=4) / len(noise)
    torch.testing.assert_close(frequency.double(), logits[0].double().softmax(-1), atol=0.012, rtol=0)


def test_noise_depends_on_seed_plus_row_only():
    assert torch.equal(row_noise(5, 3, 10)[2], row_noise(7, 1, 10)[0])
    assert torch.equal(row_noise(5, 1, 600)[0, :256], row_noise(5, 1, 10)[0, :256])


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0},
                                    {"guidance": float("nan")}, {"seed": -1}])
def test_impossible_options_are_named(option):
    with pytest.raises(UserError, match=next(iter(option))):
        Sampling(**option)
