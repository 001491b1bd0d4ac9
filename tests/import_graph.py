"""Which module of the project imports which, imports inside functions included, and whether any stand in a circle."""

import ast
from collections.abc import Iterable
from pathlib import Path


def dotted_name(path: Path, root: Path) -> str:
    """Of a module of the checkout `root`: `onevocab.kernels.vq`, `benchmarks.gpu`, `train`."""
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    return name if len(parts) == 1 or parts[0] == "benchmarks" else f"onevocab.{name}"


def import_graph(paths: Iterable[Path], root: Path) -> dict[str, set[str]]:
    """module -> the modules among `paths` that it imports, at any depth of its code and by `import_module("...")`.

    `from package import name` is an import of package.name where that is a module, and of the package otherwise. That
    an import runs the packages above it is not counted: a package may import its own modules.
    """
    sources = {dotted_name(path, root): path.read_text(encoding="utf-8") for path in paths}
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                wanted = [str(node.args[0].value)] if called in ("import_module", "__import__") else []
            for each in wanted:
                found = each if each in sources else each.rpartition(".")[0]
                if found in sources and found != name:
                    graph[name].add(found)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1:
                found.append(component)

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found)
