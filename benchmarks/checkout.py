"""Lets `onevocab.kernels` and `onevocab.common` be imported from a plain checkout, with nothing installed.

Imported before the first onevocab import. An installed onevocab (an editable one, in development) is left alone.
"""

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("onevocab") is None:
    package = types.ModuleType("onevocab", "The folders at the root of the checkout.")
    package.__path__ = [str(ROOT)]
    sys.modules["onevocab"] = package
