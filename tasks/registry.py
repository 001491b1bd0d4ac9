"""Tasks by the dotted name of a module: its `TASKS`, in order, and the `SESSION` that they share."""

import importlib
from typing import NamedTuple

from onevocab.common.errors import UserError
from onevocab.tasks.session import Session
from onevocab.tasks.task import Task


class TaskModule(NamedTuple):
    """tasks: in the order of the report; session: a subclass of Session."""

    tasks: tuple[Task, ...]
    session: type[Session]


def collect(package: str, *modules: str) -> tuple[Task, ...]:
    """The TASKS of a package's modules, one after the other: what a package of tasks sets its own TASKS to. An added
    task is a module and its name here."""
    return tuple(task for module in modules for task in importlib.import_module(f"{package}.{module}").TASKS)


def load_tasks(name: str) -> TaskModule:
    """Imports a module, such as "onevocab.demo.tasks" or a file `my_tasks.py` of the working directory as "my_tasks".

    Raises UserError when it is not found, has no TASKS, or these hold what is no Task.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"tasks = {name!r} is no dotted name of a module; a file my_tasks.py here is \"my_tasks\"")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            raise UserError(f"tasks = {name!r}: there is no module {error.name}; it must be installed, or lie in the "
                            "folder in which the command is run") from None
        raise UserError(f"tasks = {name!r}: it imports {error.name}, which is not installed") from None
    tasks = getattr(module, "TASKS", None)
    if not isinstance(tasks, tuple | list) or not tasks:
        raise UserError(f"tasks = {name!r}: the module has no TASKS; set it to a tuple of tasks, in the report's order")
    for task in tasks:
        if not isinstance(task, Task):
            hint = "; put () behind it" if isinstance(task, type) and issubclass(task, Task) else ""
            raise UserError(f"tasks = {name!r}: TASKS holds {task!r}, which is no onevocab.tasks.Task{hint}")
        if not getattr(task, "name", ""):
            raise UserError(f"tasks = {name!r}: {type(task).__name__} has no name")
    names = [task.name for task in tasks]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise UserError(f"tasks = {name!r}: two tasks are called {twice!r}")
    session = getattr(module, "SESSION", Session)
    if not isinstance(session, type) or not issubclass(session, Session):
        raise UserError(f"tasks = {name!r}: SESSION is {session!r}, not a subclass of onevocab.tasks.Session")
    return TaskModule(tuple(tasks), session)
