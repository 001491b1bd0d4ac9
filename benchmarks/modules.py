"""Which benchmarks of presets there are: every module of this folder that sets PRESETS. Found, not listed."""

import re
from importlib import import_module
from pathlib import Path

from benchmarks.work import Preset


def names() -> list[str]:
    """The modules' names, in the order of the alphabet. Nothing is imported: some need what is not installed."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    return [name for name, text in sources.items() if re.search(r"^PRESETS\b.* = ", text, re.MULTILINE)]


def presets(name: str) -> dict[str, Preset]:
    """What `benchmarks.<name>` can run. Raises what its import raises."""
    return import_module(f"benchmarks.{name}").PRESETS
