"""Who judges the demo's tasks: a reader of pictures and a listener, and what the tokenizers lose by their judgement."""

import numpy as np

from onevocab.common.errors import UserError
from onevocab.demo import speech, speech_judge, world
from onevocab.demo.picture_judge import PictureJudge, Reading, to_array
from onevocab.demo.speech_judge import spell
from onevocab.evaluation import metrics
from onevocab.evaluation.metrics import row
from onevocab.tasks import Card, Item, Section, Session

NOTHING = Reading(None, (None,) * 4)
RECONSTRUCTED = Section("Through the tokenizers", "Originals, and the same after encoding and decoding: no model "
                        "output can be better.")
SHOWN = 12  # pictures among its cards, and half as many sounds


def same_phrase(answer: dict, heard: str | None):
    """A metric's score of a phrase that was heard."""
    return int(heard is not None and spell(heard) == spell(answer["say"])), 1


class Judges(Session):
    """Phrases are heard among candidates, which the report lists; `pools`: phrases they are drawn from, by task."""

    hot = ("draw", "vqa", "caption", "edit", "say")
    examples = ("spoken_question", "caption")

    def __init__(self, folder, config, tokenizers, notes):
        super().__init__(folder, config, tokenizers, notes)
        self.eye = None
        if "image" in tokenizers.media:
            self.eye = PictureJudge.of(folder, config.judge_steps, config.seed, config.judge_floor)
        self.ear = speech_judge.SpeechJudge() if speech_judge.available() else None
        self.pools: dict[str, list[str]] = {}
        self.candidates: dict[str, list[str]] = {}
        if not speech.available():
            notes.append("No speech extra is installed, so what needs eSpeak is not measured.")

    def look(self, pictures: list) -> list[Reading]:
        """Readings of pictures (None: nothing was drawn)."""
        readings = iter(self.eye.read([picture for picture in pictures if picture is not None]))
        return [NOTHING if picture is None else next(readings) for picture in pictures]

    def hearing(self) -> speech_judge.SpeechJudge:
        if self.ear is None:
            raise UserError("judging speech needs pocketsphinx; run `pip install 'onevocab[judge]'`")
        return self.ear

    def known(self, task: str, items: list[Item]) -> list[Item]:
        """The items whose phrases the ear can know; they join the task's pool."""
        ear = self.hearing()
        known = [item for item in items if ear.knows(item.answer["say"])]
        if len(known) < len(items):
            self.notes.append(f"{task}: {len(items) - len(known)} of {len(items)} phrases hold words that "
                              "pocketsphinx's dictionary lacks; they are left out.")
        self.pools[task] = sorted({*self.pools.get(task, ()), *(item.answer["say"] for item in known)})
        return known

    def listen(self, sounds: list, phrases: list[str], task: str) -> list[str | None]:
        """What is heard in each of some sounds ((samples, rate); None: silence), whose right phrases these are."""
        jobs = []
        for sound, phrase in zip(sounds, phrases, strict=True):
            choice = speech_judge.candidates(phrase, self.pools[task], self.config.candidates, self.config.seed)
            self.candidates[f"{task}: {phrase}"] = choice
            jobs.append((*(sound or (np.zeros(1600, np.float32), 16_000)), choice))
        return speech_judge.hear_all(jobs)

    def chance(self, task: str) -> float:
        return 1 / min(self.config.candidates, len(self.pools[task]))

    def reconstructions(self, count: int) -> tuple[list[dict], dict]:
        """How much the tokenizers lose, on pictures and voices that they were not trained on."""
        rows, cards = [], []
        for measure, name, split, metric in (
            (self._pictures, "image_reconstruction_psnr", "held-out compositions", "dB, mean over pictures"),
            (self._sounds, "audio_reconstruction_judge", "held-out voices", "phrases heard right"),
        ):
            try:
                scores, new = measure(name, count)
                rows.append(row(name, split, metric, **scores))
                cards += new
            except UserError as error:
                rows.append(row(name, split, metric, None))
                self.notes.append(f"{name}: {error}")
        return rows, {RECONSTRUCTED: cards}

    def _check(self, modality: str) -> None:
        if modality not in self.tokenizers.media:
            raise UserError(f"this model has no {modality}")

    def _pictures(self, name: str, count: int) -> tuple[dict, list[Card]]:
        self._check("image")
        rng = np.random.default_rng([self.config.seed, 5])
        originals = [world.picture(world.held_out_scene(rng)) for _ in range(count)]
        decoded = self.through_tokenizer("image", originals)
        values = [metrics.psnr(to_array(one), to_array(other)) for one, other in zip(originals, decoded, strict=True)]
        cards = [Card([("original", one), ("decoded", other)], [("PSNR", f"{value:.1f} dB")])
                 for one, other, value in zip(originals[:SHOWN], decoded, values, strict=False)]
        return {"scores": [(value, 1) for value in values]}, cards

    def _sounds(self, name: str, count: int) -> tuple[dict, list[Card]]:
        self._check("audio")
        ear = self.hearing()
        phrases = self.pools[name] = [phrase for phrase in world.NAMES if ear.knows(phrase)]
        phrases = [phrases[k % len(phrases)] for k in range(count)]
        sounds = [(speech.speak(phrase, speech.TEST_VOICES[k % 3]), speech.RATE) for k, phrase in enumerate(phrases)]
        decoded = self.through_tokenizer("audio", sounds)
        heard = self.listen(sounds + decoded, phrases * 2, name)
        scores = [(int(one == phrase), 1) for one, phrase in zip(heard, phrases * 2, strict=True)]
        cards = [Card([("original", sounds[k]), ("decoded", decoded[k])],
                      [("said", phrases[k]), ("heard", heard[count + k] or "none of these")],
                      bool(scores[count + k][0]))
                 for k in range(min(SHOWN // 2, count))]
        return {"scores": scores[count:], "original": scores[:count], "chance": self.chance(name)}, cards

    def closing(self) -> list[str]:
        return ["caption_*: the ceilings are what the picture judge reads. Recognition, questions and boxes are "
                "compared with the exact answer, which has no judge and so no ceiling."]

    def judges(self) -> dict:
        eye = {} if self.eye is None else {
            "classes": len(self.eye.names) + 1, "floor": self.eye.floor, "steps": self.config.judge_steps,
            "trained_on": "renderings of cells, blurred, shrunk, shifted, recoloured, noisy"}
        ear = {"engine": "pocketsphinx", "chance": 1 / self.config.candidates,
               "none_of_these": self.ear.garbage([]) if self.ear else [],
               "candidates": self.candidates if self.ear else {}}
        return {"pictures": eye, "speech": ear}
