"""The judge of sound: pocketsphinx (CMU Sphinx, with its own English acoustic model), which never saw this project.

It decides among a few phrases, one right and the others drawn by a fixed seed, and may answer "none of these": the
grammar also holds words that nobody asked for, and when one of those explains the sound better, nothing was
understood. Its vocabulary is closed, so chance is 1 / candidates; the report lists the candidates.
"""

import functools
import importlib.util
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from onevocab.common.errors import UserError

RATE = 16_000
GARBAGE_WORDS = 20
MANY = 60  # from so many sounds on a second process is worth its start


def available() -> bool:
    """Whether pocketsphinx is installed."""
    return importlib.util.find_spec("pocketsphinx") is not None


def prepare(samples: np.ndarray, rate: int, seed: int = 0) -> bytes:
    """float32 (n,) -> 16-bit PCM for the decoder: peak 0.7, 0.25 s of padding at both ends, and a little noise,
    without which the acoustic model, trained on recorded rooms, loses 25 points on synthetic silence."""
    if rate != RATE:
        raise UserError(f"the speech judge hears 16 kHz, got {rate} Hz; resample the sound first")
    samples = np.asarray(samples, np.float32).reshape(-1)
    samples = np.nan_to_num(samples)
    samples = np.pad(samples * (0.7 / max(1e-4, float(np.abs(samples).max(initial=0)))), RATE // 4)
    samples = samples + np.random.default_rng(seed).normal(0, 1e-3, len(samples))
    return (samples.clip(-1, 1) * 32767).astype("<i2").tobytes()


def spell(phrase: str) -> str:
    """A phrase as the decoder's dictionary writes it: lower case, no punctuation."""
    return " ".join(re.findall(r"[a-z']+", phrase.lower()))


class SpeechJudge:
    """One decoder. `hear` chooses among phrases."""

    def __init__(self, seed: int = 0):
        try:
            import pocketsphinx
        except ImportError as error:
            raise UserError(f"judging speech needs pocketsphinx ({error}); run `pip install 'onevocab[judge]'` "
                            "(from a clone: pip install -e '.[judge]')") from None
        # Only grammars are searched; no language model is loaded.
        self.decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", samprate=RATE)
        dictionary = Path(pocketsphinx.get_model_path()) / "en-us" / "cmudict-en-us.dict"
        entries = (line.split() for line in dictionary.read_text(encoding="utf-8").splitlines())
        words = [entry[0] for entry in entries if entry and entry[0].isalpha() and 4 <= len(entry) <= 9]
        order = np.random.default_rng(seed + 40).permutation(len(words))
        self._garbage = [words[k] for k in order[: 4 * GARBAGE_WORDS]]

    def knows(self, phrase: str) -> bool:
        """Whether every word of a phrase is in the decoder's dictionary."""
        words = spell(phrase).split()
        return bool(words) and all(self.decoder.lookup_word(word) is not None for word in words)

    def garbage(self, phrases) -> list[str]:
        """The words that mean "none of these": drawn from the dictionary, none of which the phrases use."""
        used = {word for phrase in phrases for word in spell(phrase).split()}
        return [word for word in self._garbage if word not in used][:GARBAGE_WORDS]

    def hear(self, samples: np.ndarray, rate: int, candidates: list[str]) -> str | None:
        """The candidate that was said, or None: nothing heard, or garbage fits better."""
        spelled = {spell(phrase): phrase for phrase in candidates}
        garbage = self.garbage(spelled)
        # Against phrases of several words the alternative is any sequence of garbage words.
        loop = "<garbage>+" if any(" " in phrase for phrase in spelled) else "<garbage>"
        self.decoder.add_jsgf_string(
            "judge",
            f"#JSGF V1.0; grammar judge; public <said> = {' | '.join(spelled)} | {loop};"
            f" <garbage> = {' | '.join(garbage)};",
        )
        self.decoder.activate_search("judge")
        self.decoder.start_utt()
        self.decoder.process_raw(prepare(samples, rate), full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return spelled.get(hypothesis.hypstr) if hypothesis else None


@functools.cache
def _judge() -> SpeechJudge:
    return SpeechJudge()


def _hear_all(jobs) -> list[str | None]:
    return [_judge().hear(*job) for job in jobs]


@functools.cache
def _second_process() -> ProcessPoolExecutor:
    """Kept until this process ends. spawn: this one has threads (torch's), which a fork could freeze."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def hear_all(jobs: list[tuple[np.ndarray, int, list[str]]]) -> list[str | None]:
    """`SpeechJudge.hear` for many (samples, rate, candidates), in two processes when there are many."""
    if len(jobs) < MANY:
        return _hear_all(jobs)
    half = len(jobs) // 2
    other = _second_process().submit(_hear_all, jobs[half:])
    return _hear_all(jobs[:half]) + other.result()


def candidates(phrase: str, pool: list[str], count: int, seed: int) -> list[str]:
    """`phrase` and count - 1 others of the pool, in an order that does not tell which is right."""
    others = sorted({spell(other): other for other in pool if spell(other) != spell(phrase)}.values())
    rng = np.random.default_rng([seed, *spell(phrase).encode()])
    chosen = [others[k] for k in rng.permutation(len(others))[: count - 1]]
    chosen.insert(int(rng.integers(len(chosen) + 1)), phrase)
    return chosen
