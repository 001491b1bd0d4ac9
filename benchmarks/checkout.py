"""Lets `onevocab.kernels` and `onevocab.common` be imported from a plain checkout, with nothing installed.

Imported before the first onevocab import. An installed onevocab (an editable one, in development) is left alone.
"""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("onevocab") is None:
    package = types.ModuleType("onevocab", "The folders at the root of the checkout.")
    package.__path__ = [str(ROOT)]
    package.__spec__ = ModuleSpec("onevocab", None, is_package=True)  # without one, find_spec raises
    package.__spec__.submodule_search_locations = package.__path__
    sys.modules["onevocab"] = package

_kernels = importlib.util.find_spec("onevocab.kernels")
_places = [Path(place).resolve() for place in (_kernels and _kernels.submodule_search_locations) or ()]
if ROOT / "kernels" not in _places:
    raise ImportError(f"onevocab.kernels is found in {', '.join(map(str, _places)) or 'no place'}, not in {ROOT}: "
                      "another checkout's kernels would be timed")
