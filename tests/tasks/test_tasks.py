"""Tasks without a demo: what a small one gets for nothing, and what is said of modules that hold none."""

import sys

import numpy as np
import pytest

from onevocab.common.errors import UserError
from onevocab.tasks import FIRST, HELD_OUT, SEEN, Metric, Session, Task, Wordings, load_tasks

WORDINGS = Wordings(("{one} + {other}?", "Add {one} and {other}.", "The sum of {one} and {other}?",
                     "How much is {one} and {other}?"))


class Sum(Task):
    name = "sum"
    wordings = (WORDINGS,)
    metrics = (Metric("sum", "right", lambda answer, reply: (int(answer["text"] == reply), 1)),)

    def example(self, rng, split, wording):
        one, other = rng.integers(10, size=2) + (0 if split == "train" else 10)
        return [("user", [WORDINGS.pick(rng, wording, one=one, other=other)]), ("assistant", [str(one + other)])]


def test_the_last_two_wordings_are_held_out():
    assert WORDINGS.of(SEEN) == WORDINGS[:2] and WORDINGS.of(HELD_OUT) == WORDINGS[2:]
    rng = np.random.default_rng(0)
    assert {WORDINGS.pick(rng, SEEN, one=1, other=2) for _ in range(50)} == {"1 + 2?", "Add 1 and 2."}
    assert {WORDINGS.pick(rng, FIRST, one=1, other=2) for _ in range(50)} == {"1 + 2?"}
    with pytest.raises(ValueError, match="at least 3"):
        Wordings(("one", "two"))


def test_items_of_all_splits_are_about_the_same_and_their_number_changes_none():
    task = Sum()
    items = task.items("test", 20, 0)
    assert items[:5] == task.items("test", 5, 0) != task.items("test", 5, 1)
    worded = task.items("wordings", 20, 0)
    assert [item.answer for item in items] == [item.answer for item in worded]
    texts = [[item.messages[0]["content"][0] for item in some] for some in (items, worded)]
    assert all("?" == text[-1] and "+" in text or text.startswith("Add") for text in texts[0])
    assert not set(texts[0]) & set(texts[1])
    assert all(task.metrics[0].score(item.answer, task.right(item)) == (1, 1) for item in items)
    assert all(int(item.answer["text"]) >= 20 for item in items), "the split reaches the task"


def write(folder, text: str) -> str:
    """A module of that text; returns its name."""
    name = f"tasks_{len(list(folder.iterdir()))}_{abs(hash(text))}"
    (folder / f"{name}.py").write_text(text)
    return name


HEAD = "from onevocab.tasks import Task\nclass One(Task):\n    name = 'one'\n    def example(self, *a): return []\n"


@pytest.mark.parametrize("text, message", [
    (None, "no module no_such_tasks"),
    ("import no_such_package", "it imports no_such_package, which is not installed"),
    ("ONE = 1", "has no TASKS"),
    ("TASKS = ()", "has no TASKS"),
    (HEAD + "TASKS = (One(), 3)", "holds 3, which is no"),
    (HEAD + "TASKS = (One,)", r"put \(\) behind it"),
    (HEAD + "TASKS = (One(), One())", "two tasks are called 'one'"),
    (HEAD + "One.name = ''\nTASKS = (One(),)", "One has no name"),
    (HEAD + "TASKS = (One(),)\nSESSION = 3", "SESSION is 3"),
])
def test_what_is_no_module_of_tasks_is_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = "no_such_tasks" if text is None else write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        load_tasks(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "./my_tasks.py", ".tasks", "my tasks", "onevocab.demo.no_such", "sys.path"])
def test_names_that_are_none_are_one_line(name):
    with pytest.raises(UserError, match="tasks = "):
        load_tasks(name)


def test_a_module_gives_its_tasks_in_order_and_a_session(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = write(tmp_path, HEAD + "class Two(One): name = 'two'\nTASKS = [Two(), One()]")
    module = load_tasks(name)
    assert [task.name for task in module.tasks] == ["two", "one"] and module.session is Session
    assert name in sys.modules
