"""What is sent when a conversation outgrows the context, and how a reply says that it was cut, on a tiny model."""

from pathlib import Path

import numpy as np
import pytest
from chatting import FakeModel
from PIL import Image
from tiny import tiny_decoder, tiny_tokenizers

from onevocab.common.errors import UserError
from onevocab.generation import AnyToAny, Reply
from onevocab.generation.context import fit, remark, reserve
from onevocab.generation.files import completions, write_new
from onevocab.tokenizers.document import Segment
from onevocab.tokenizers.grammar import Grammar


@pytest.fixture(scope="module")
def model() -> AnyToAny:
    tokenizers = tiny_tokenizers()
    return AnyToAny(tiny_decoder(tokenizers.vocab), tokenizers)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8))


def turns(*contents: str) -> list[dict]:
    """A system turn, then user and assistant by turns."""
    return [{"role": "system", "content": "brief"},
            *({"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents))]


def test_whole_exchanges_go_oldest_first_and_the_rest_keeps_its_order(model):
    contents = ["1" * 30, "2" * 30, [picture(1), "3" * 5], "4" * 10, [picture(2), picture(1), "5"]]
    everything = model.encode(turns(*contents))
    fitted = fit(model, turns(*contents), "text", 40)
    assert fitted.dropped == 1 and [message["role"] for message in fitted.messages] == [
        "system", "user", "assistant", "user"]
    assert fitted.messages == [everything[0], *everything[3:]]
    request, = model._requests([fitted.messages], "text", False, 40)
    assert fitted.prompt_tokens == len(request.prompt) == model.count_tokens(fitted.messages)
    assert fitted.left == 160 - fitted.prompt_tokens >= fitted.reserved == 40
    whole = fit(model, turns(*contents[2:]), "text", 40)
    assert whole.dropped == 0 and whole.messages == fitted.messages  # no more is dropped than must be


def test_the_newest_message_stays_or_is_refused(model):
    fitted = fit(model, turns("1" * 50, "2" * 50, "3" * 140), "text")
    assert [message["role"] for message in fitted.messages] == ["system", "user"] and fitted.dropped == 1
    assert fitted.left < fitted.reserved == 40
    with pytest.raises(UserError, match="this message alone takes .* of 160 tokens; shorten it"):
        fit(model, turns("1", "2", "3" * 200), "text")
    assert fit(model, "hello").dropped == fit(model, [picture(1), "hello"]).dropped == 0  # a prompt of any form


def test_a_pretrained_model_drops_the_oldest_too(model):
    plain = AnyToAny(model.model, model.tokenizers, plain=True)
    fitted = fit(plain, turns("1" * 80, "2" * 30, "3" * 20), "text", 40)
    assert fitted.dropped == 1 and fitted.prompt_tokens == 1 + len("brief") + 20


def test_the_reserve_is_a_quarter_of_the_context_or_a_picture():
    model = FakeModel(context_length=400)
    assert [reserve(model, want) for want in ("any", "text", "image", "audio")] == [64, 64, 20, 40]
    model.context_length = 60
    assert [reserve(model, want) for want in ("any", "text", "image", "audio")] == [20, 15, 20, 15]
    assert reserve(model, "any", 7) == 7


def test_codes_sent_again_are_the_same_prompt(model):
    messages = [{"role": "user", "content": [picture(1), "what?"]}, {"role": "assistant", "content": "a dog"},
                {"role": "user", "content": ["and", picture(2)]}]
    once = model.encode(messages)
    first, again, thrice = (model._requests([each], "text", False, 4)[0].prompt.tolist()
                            for each in (messages, once, model.encode(once)))
    assert first == again == thrice and all(isinstance(part, Segment) for turn in once for part in turn["content"])


def test_what_was_streamed_can_be_sent_back(model):
    kinds = set()
    for seed in (0, 7):
        *events, last = model.stream(["draw"], "any", seed=seed, max_new_tokens=60, temperature=8.0)
        shown = [(event.kind, event.codes.tolist()) for event in events if event.kind in model.vocab.spans]
        kinds |= {kind for kind, _ in shown}
        assert shown == [(part.modality, part.content.tolist()) for part in last.value.segments
                         if part.modality != "text"]
    assert kinds == {"image", "audio"}


def test_a_reply_says_whether_it_was_cut(model):
    reasons = set()
    for want in ("any", "text", "audio"):
        for reply in model.generate_batch(["a dog"] * 60, want, 3.0, max_new_tokens=30):
            ended = reply.ids[-1] == model.vocab.end_of_turn
            sounds = [part.content for part in reply.segments if part.modality == "audio"]
            if want == "audio":  # 30 ids: begin, 14 columns of 2, end
                assert reply.finish_reason == ("length" if len(sounds[0]) == 14 else "stop")
            elif not ended or not sounds:
                assert reply.finish_reason == ("stop" if ended else "length")
            reasons.add((want, reply.finish_reason))
    assert len(reasons) == 6
    assert {reply.finish_reason for reply in model.generate_batch(["a"] * 5, "image", max_new_tokens=20)} == {"stop"}
    *_, last = model.stream("a dog", "text", max_new_tokens=1)
    assert last.value.finish_reason == "length" and last.value.prompt_tokens == model.count_tokens("a dog")


def test_a_sound_that_the_limit_closed_is_cut_even_if_the_model_then_ends(model):
    span = model.vocab.spans["audio"]
    for columns, cut in ((2, False), (3, True)):
        grammar = Grammar(model.vocab, "any", model.grids, budget=9)
        for id in [span.begin, *[span.codes_start] * 2 * columns, span.end, model.vocab.end_of_turn]:
            grammar.accept(id)
        assert grammar.done and grammar.cut == cut


def test_what_cut_it_is_named(model):
    prompt = "1" * 140
    reply = next(reply for seed in range(20) if (reply := model.generate(prompt, "text", seed=seed)).finish_reason ==
                 "length")
    assert f"its {len(reply.ids)} tokens and the prompt's {reply.prompt_tokens} fill the context of 160" in remark(
        model, reply, "text")
    reply = model.generate("a", "text", max_new_tokens=1)
    assert remark(model, reply, "text", 1).startswith("the answer was cut at 1 new tokens; raise max_new_tokens")
    assert remark(model, Reply()).startswith("the answer is empty")
    assert remark(model, Reply(text="a", segments=[Segment("text", "a")])) is None


def test_an_interrupted_file_is_not_left_half_written(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise KeyboardInterrupt

    def broken(path, mode):
        Path(path).touch(exist_ok=False)
        return Full()

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path, "image", picture(1))
    assert not list(tmp_path.iterdir())


def test_completions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a cat.png", "a dog.wav", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "a (folder)").mkdir()
    commands = ("/image", "/want")
    assert completions("/wa", commands) == ["/want"] and completions("a message a", commands) == []
    assert completions("/image a", commands) == ["/image a\\ \\(folder\\)/", "/image a\\ cat.png", "/image a\\ dog.wav"]
    assert completions("/image ", commands) == completions("/image a", commands)  # no hidden ones
    assert completions("/image a\\ c", commands) == ["/image a\\ cat.png"]
    assert completions("~/a\\ d", commands) == ["~/a\\ dog.wav"] and completions("/want a", commands) == []
    assert completions("/image .h", commands) == ["/image .hidden.png"] and completions("/image none/", commands) == []
    assert completions(f"{tmp_path}/a\\ d", commands) == [f"{tmp_path}/a\\ dog.wav"] and completions("", commands) == []
