"""Phases: for some steps other data take the place of the usual ones, which then go on where they were."""

from dataclasses import dataclass

from onevocab.common.errors import UserError
from onevocab.data.loader import Batch, PackedLoader


@dataclass(frozen=True)
class Phase:
    """Steps start .. start + steps - 1 of the stage are batches of this loader."""

    start: int
    steps: int
    loader: PackedLoader


class MixtureSchedule:
    """A loader of its own: `next_batch`, `state_dict`, `load_state_dict` are PackedLoader's.

    usual: what is read outside of the phases, which must not overlap (`StageData` sees to that).
    """

    def __init__(self, usual: PackedLoader, phases: list[Phase]):
        self.usual, self.phases = usual, sorted(phases, key=lambda phase: phase.start)
        self._step = 0

    def next_batch(self) -> Batch:
        loader = next((phase.loader for phase in self.phases
                       if phase.start <= self._step < phase.start + phase.steps), self.usual)
        self._step += 1
        return loader.next_batch()

    def state_dict(self) -> dict:
        return {"step": self._step, "usual": self.usual.state_dict(),
                "phases": [[phase.start, phase.steps, phase.loader.state_dict()] for phase in self.phases]}

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError when the data, their order, the seed or the phases are not those of the state."""
        before = state["phases"]
        if [entry[:2] for entry in before] != [[phase.start, phase.steps] for phase in self.phases]:
            raise UserError("the phases are not those of the checkpoint's run; restore the configuration, or start "
                            "the stage anew")
        self.usual.load_state_dict(state["usual"])
        for phase, (_, _, loader_state) in zip(self.phases, before, strict=True):
            phase.loader.load_state_dict(loader_state)
        self._step = state["step"]
