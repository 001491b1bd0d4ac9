"""A text spoken."""

from onevocab.demo.judges import same_phrase
from onevocab.demo.task import DemoTask, SpokenTask
from onevocab.demo.tasks.hear import some_name
from onevocab.demo.utterance import narrated
from onevocab.tasks import Card, Metric, Section, Wordings

WORDINGS = Wordings(("Say {text}", "Speak: {text}", "Read this: {text}", "Can you say {text}?",
                     "Say this: {text}", "Speak this: {text}"))
SPOKEN = Section("Spoken by the model", "A text or a picture in, sound out. The speech judge chose among the listed "
                 "candidates.")


class Narrated(DemoTask):
    """A name spoken, and the name, without an instruction."""

    name, media, want, stage, samples, position = "narrated", ("audio",), "audio", "pretrain", 1_600, 0
    augmented = False  # what the model learns to speak like

    def example(self, rng, split, wording):
        spoken = narrated(some_name(rng), rng)
        return [(None, [spoken, spoken.text])]


class Say(SpokenTask):
    """Names in turn."""

    name, media, samples, position, section = "say", ("audio",), 2_000, 4, SPOKEN
    held_out = "nothing held out: seen names"
    wordings = (WORDINGS,)
    metrics = (Metric("text_to_speech", "phrases heard right", same_phrase),)

    def example(self, rng, split, wording, text=None):
        text = text or some_name(rng)
        return [("user", [WORDINGS.pick(rng, wording, text=text)]), ("assistant", [narrated(text, rng)])]

    def evaluated(self, rng, split, wording, number, seed):
        return self.example(rng, split, wording, self.name_in_turn(number, seed)), {}

    def card(self, item, reply, heard):
        return spoken_card(item, reply, heard)


def spoken_card(item, reply, heard: str | None) -> Card:
    parts = [part for message in item.messages for part in message["content"]]
    media = [("picture", part) for part in parts if not isinstance(part, str)]
    media += [("model", sound) for sound in reply.audio[:1]]
    prompt = " ".join(part for part in parts if isinstance(part, str))
    return Card(media, [("prompt", prompt), ("wanted", item.answer["say"]), ("heard", heard or "none of these")])


TASKS = (Narrated(), Say())
