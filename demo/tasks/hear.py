"""What is said, written down."""

from onevocab.demo.task import HELD_OUT_VOICES, VOICES, DemoTask, same_text
from onevocab.demo.tasks.captions import answer_card
from onevocab.demo.tasks.spoken_question import spoken_questions
from onevocab.demo.utterance import in_some_voice
from onevocab.demo.world import NAMES
from onevocab.evaluation import metrics
from onevocab.tasks import Metric, Section, Wordings

WORDINGS = Wordings(("What is said?", "Write down what you hear.", "What do you hear?", "Write what is said.",
                     "Can you write what you hear?",
                     "Tell me what is said.", "Write down what is said."))
UNDERSTOOD = Section("Understood by the model", "Voices that were never trained on.")


def some_name(rng) -> str:
    return str(rng.choice(NAMES))


def some_question(rng) -> str:
    questions = spoken_questions()
    return questions[int(rng.integers(len(questions)))]


def same_words(answer: dict, reply: str):
    return metrics.word_score(answer["text"], reply)


class Hear(DemoTask):
    """A name two times of three, else a whole question; in evaluation in turn."""

    name, media, samples, position = "hear", ("audio",), 3_000, 3
    held_out, controls, section = HELD_OUT_VOICES, VOICES, UNDERSTOOD
    wordings = (WORDINGS,)
    metrics = (Metric("speech_recognition", "words right (1 - WER)", same_words),
               Metric("speech_recognition", "sentences exact", same_text))

    def example(self, rng, split, wording, text=None):
        text = text or (some_name(rng) if rng.random() < 0.67 else some_question(rng))
        spoken = in_some_voice(text, rng, split)
        return [("user", [spoken, WORDINGS.pick(rng, wording)]), ("assistant", [spoken.text])]

    def evaluated(self, rng, split, wording, number, seed):
        kind = ("names", "questions")[number % 2]
        text = self.name_in_turn(number, seed) if kind == "names" else some_question(rng)
        return self.example(rng, split, wording, text), {"kind": kind}

    def card(self, item, reply, verdict):
        return answer_card(item, reply)


class Heard(Hear):
    """The same to pretrain on."""

    name, stage, samples, position, metrics = "heard", "pretrain", 9_000, 1, ()


TASKS = (Heard(), Hear())
