"""Draws the floors, the folders on them, and which folder imports which: docs/images/floors.png.

    python docs/draw_floors.py

Floors are those that tests/test_project.py checks; lines are counted and imports are found in the files as they are.
"""

import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]
from import_graph import dotted_name, import_graph  # noqa: E402
from test_project import FLOORS, modules  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "floors.png"
WIDTH, HEIGHT = 1.7, 0.62
# From the left, so that few arrows pass behind a box; a folder that is not listed stands at the right.
PLACES = {"benchmarks": 1.0, "training": 1.9, "kernels": 3.1, "data": 4.1, "tokenizers": 4.7, "pipeline": 4.2,
          "train": 4.2, "demo": 5.6, "evaluation": 7.0, "model": 7.4, "generation": 7.6, "sample": 8.6, "tasks": 9.4}
LAST = 11.0
GROUND = "common"  # imported by all: a bar under everything, without arrows
SCRIPTS = {"train": "train.py", "sample": "sample.py"}


def folder_imports() -> Counter:
    """(folder, imported folder) -> how many pairs of modules import each other so."""
    folder_of = {dotted_name(path, ROOT): folder for folder, path in modules()}
    graph = import_graph([path for _, path in modules()], ROOT)
    pairs = Counter((folder_of[name], folder_of[other]) for name, others in graph.items() for other in others)
    return Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})


def implied(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that also follow from others, by way of a folder between them."""
    def reaches(start: str, goal: str) -> bool:
        return any(other == goal or reaches(other, goal) for one, other in pairs if one == start)

    return {(one, two) for one, two in pairs
            if any(first == one and other != two and reaches(other, two) for first, other in pairs)}


def sizes() -> dict[str, tuple[int, int]]:
    """folder -> (modules, lines)."""
    counts: dict[str, tuple[int, int]] = {}
    for folder, path in modules():
        count, lines = counts.get(folder, (0, 0))
        counts[folder] = count + 1, lines + len(path.read_text(encoding="utf-8").splitlines())
    return counts


def box(axes: Axes, x: float, y: float, width: float, name: str, size: tuple[int, int]) -> None:
    count, lines = size
    axes.add_patch(FancyBboxPatch((x - width / 2, y - HEIGHT / 2), width, HEIGHT, zorder=3,
                                  boxstyle="round,pad=0,rounding_size=0.1", facecolor="#eef3f8", edgecolor="#3b5b7a",
                                  linewidth=1.0))
    title = SCRIPTS.get(name, f"{name}/")
    axes.text(x, y + 0.11, title, ha="center", va="center", fontsize=11, weight="bold", zorder=4)
    text = f"{lines:,} lines" if name in SCRIPTS else f"{count} modules, {lines:,} lines"
    axes.text(x, y - 0.15, text, ha="center", va="center", fontsize=7.5, color="#444444", zorder=4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], faint: bool) -> None:
    axes.add_patch(FancyArrowPatch((start[0], start[1] - HEIGHT / 2), (end[0], end[1] + HEIGHT / 2), arrowstyle="-|>",
                                   mutation_scale=7 if faint else 11, linewidth=0.5 if faint else 1.1, shrinkA=0,
                                   shrinkB=1, color="#c3c9d0" if faint else "#3b5b7a", zorder=1 if faint else 2))


def main() -> None:
    size, imports = sizes(), folder_imports()
    levels = sorted({FLOORS[name] for name in size})
    at = {name: (PLACES.get(name, LAST), float(levels.index(FLOORS[name]))) for name in size}
    right = max(x for name, (x, _) in at.items() if name != GROUND) + WIDTH / 2
    figure, axes = plt.subplots(figsize=(10.5, 0.8 * len(levels) + 0.6), layout="constrained")
    pairs = {pair for pair in imports if pair[1] != GROUND}
    follow = implied(pairs)
    for one, two in sorted(pairs):
        arrow(axes, at[one], at[two], (one, two) in follow)
    for level in range(0, len(levels), 2):
        axes.axhspan(level - 0.5, level + 0.5, color="#f7f7f5", zorder=0)
    for name, (x, y) in at.items():
        if name == GROUND:
            box(axes, right / 2, y, right, name, size[name])
        else:
            box(axes, x, y, WIDTH, name, size[name])
    without = sorted(set(size) - {one for one, two in imports if two == GROUND} - {GROUND})
    note = f"All import {GROUND}/" + (f" but {', '.join(without)}" if without else "")
    axes.text(right / 2, -0.62, f"Arrows are imports. A light one goes where dark ones also lead. {note}.", ha="center",
              fontsize=8.5, color="#444444")
    axes.set(xlim=(-0.1, right + 0.1), ylim=(-0.8, len(levels) - 0.5))
    axes.axis("off")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
