"""A name heard as other recordings have it: silence, loudness, noise, formats, rooms, speeds, another synthesiser."""

from functools import lru_cache

from onevocab.demo import conditions, speech
from onevocab.demo.conditions import CONDITIONS
from onevocab.demo.task import HELD_OUT_VOICES, same_text
from onevocab.demo.tasks.hear import Hear
from onevocab.demo.utterance import Utterance
from onevocab.tasks import Metric

OTHER = "flite"


@lru_cache(maxsize=1024)
def recorded(utterance: Utterance):
    """One recording for all conditions: eSpeak never says the same twice."""
    return speech.speak(utterance.text, utterance.voice, utterance.words_per_minute, utterance.pitch)


class HearAnyhow(Hear):
    """The same clips under every condition. Only measured."""

    name, samples, position, count, controls_count, reworded = "hear_anyhow", None, None, "clips", "clips", False
    held_out = f"{HELD_OUT_VOICES}, as made"
    controls = {split: label for split, (label, _) in CONDITIONS.items()} | {OTHER: "another synthesiser (Flite)"}
    shuffled = False
    metrics = (Metric("names_heard", "names exact", same_text),)

    def evaluated(self, rng, split, wording, number, seed):
        return self.example(rng, split, wording, self.name_in_turn(number, seed)), {}

    def show(self, part, split):
        if not isinstance(part, Utterance):
            return part
        if split == OTHER:
            voice = conditions.FLITE_VOICES[speech.TEST_VOICES.index(part.voice) % len(conditions.FLITE_VOICES)]
            return conditions.flite(part.text, voice)
        clip = recorded(part)
        return CONDITIONS[split][1](clip) if split in CONDITIONS else (clip, speech.RATE)


TASKS = (HearAnyhow(),)
