"""The demo's tasks, in the order of the report. A new one is a module beside this file and its name below."""

from onevocab.demo.judges import Judges
from onevocab.tasks import collect

TASKS = collect(
    __name__,
    "captions",
    "questions",
    "detection",
    "several_pictures",
    "about_picture",
    "draw",
    "edit",
    "look_up",
    "hear",
    "hear_anyhow",
    "say",
    "spoken_question",
    "say_seen",
    "draw_heard",
)
SESSION = Judges
