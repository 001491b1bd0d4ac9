"""What a model can be asked, and how its answers are scored: `Task`, and what tasks are made of."""

from onevocab.tasks.registry import collect, load_tasks
from onevocab.tasks.session import Session
from onevocab.tasks.task import Card, Conversation, Item, Metric, Section, Task
from onevocab.tasks.wordings import FIRST, HELD_OUT, SEEN, Wordings

__all__ = ["FIRST", "HELD_OUT", "SEEN", "Card", "Conversation", "Item", "Metric", "Section", "Session", "Task",
           "Wordings", "collect", "load_tasks"]
