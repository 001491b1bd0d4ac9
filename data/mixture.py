"""Lessons: for some steps other data take the place of the usual ones, which then go on where they were."""

from dataclasses import dataclass

from onevocab.common.errors import UserError
from onevocab.data.loader import Batch, PackedLoader


@dataclass(frozen=True)
class Lesson:
    """Steps start .. start + steps - 1 of the stage are batches of this loader."""

    start: int
    steps: int
    loader: PackedLoader


class Curriculum:
    """A loader of its own: `next_batch`, `state_dict`, `load_state_dict` are PackedLoader's.

    usual: what is read outside of the lessons, which must not overlap (`StageData` sees to that).
    """

    def __init__(self, usual: PackedLoader, lessons: list[Lesson]):
        self.usual, self.lessons = usual, sorted(lessons, key=lambda lesson: lesson.start)
        self._step = 0

    def next_batch(self) -> Batch:
        loader = next((lesson.loader for lesson in self.lessons
                       if lesson.start <= self._step < lesson.start + lesson.steps), self.usual)
        self._step += 1
        return loader.next_batch()

    def state_dict(self) -> dict:
        return {"step": self._step, "usual": self.usual.state_dict(),
                "lessons": [[lesson.start, lesson.steps, lesson.loader.state_dict()] for lesson in self.lessons]}

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError when the data, their order, the seed or the lessons are not those of the state."""
        before = state["lessons"]
        if [entry[:2] for entry in before] != [[lesson.start, lesson.steps] for lesson in self.lessons]:
            raise UserError("the lessons are not those of the checkpoint's run; restore the configuration, or start "
                            "the stage anew")
        self.usual.load_state_dict(state["usual"])
        for lesson, (_, _, loader_state) in zip(self.lessons, before, strict=True):
            lesson.loader.load_state_dict(loader_state)
        self._step = state["step"]
