"""No modules import each other in a circle, not even inside functions."""

from conftest import ROOT
from import_graph import circles, import_graph
from test_project import FLOORS

FOLDERS = (*FLOORS.keys() - {"serving", "train", "sample"},)


def test_no_import_circle():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    graph = import_graph(sorted(paths), ROOT)
    assert sum(map(len, graph.values())) > len(graph) / 2, "hardly any import was found"
    assert circles(graph) == []


def test_a_circle_is_found(tmp_path):
    sources = {
        "kernels/a/__init__.py": "from onevocab.kernels.a.b import f",
        "kernels/a/b.py": "def f():\n    from onevocab.kernels import c",
        "kernels/c.py": "from importlib import import_module\nimport_module('onevocab.kernels.a.d')",
        "kernels/a/d.py": "import onevocab.kernels.a.b as b",
        "kernels/e.py": "from onevocab.kernels.a import f\nfrom onevocab.kernels.a import b",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = import_graph(sorted(tmp_path.rglob("*.py")), tmp_path)
    assert graph["onevocab.kernels.e"] == {"onevocab.kernels.a", "onevocab.kernels.a.b"}
    assert graph["onevocab.kernels.a"] == {"onevocab.kernels.a.b"}
    assert circles(graph) == [["onevocab.kernels.a.b", "onevocab.kernels.a.d", "onevocab.kernels.c"]]
