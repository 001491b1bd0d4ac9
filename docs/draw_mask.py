"""Draws the mask of a packed batch and what the attention kernels do with its blocks: docs/images/kernels-mask.png.

    python docs/draw_mask.py

Nothing in the picture is made by hand: visible pairs are the mask's dense form, blocks are the plans that the forward
and dQ kernels read (by query block) and that the dK/dV kernel reads (by key block).
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from onevocab.kernels.attention import IntervalMask

PICTURE = Path(__file__).resolve().parent / "images" / "kernels-mask.png"
BLOCK = 8
# (length, which earlier document it sees in full: its prefix, name)
DOCUMENTS = [(13, -1, "caption"), (22, -1, "picture"), (9, 1, "question"), (11, 1, "question"), (7, 1, "question"),
             (24, -1, "sound and text"), (4, -1, "padding")]
SKIPPED, EDGE, FULL = "#ececec", "#f2b134", "#3a9d6e"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(document, prefix), each (1, S); the last document is padding."""
    lengths = torch.tensor([length for length, _, _ in DOCUMENTS])
    ids = torch.arange(len(DOCUMENTS))
    ids[-1] = -1
    prefixes = torch.tensor([prefix for _, prefix, _ in DOCUMENTS])
    return ids.repeat_interleave(lengths)[None], prefixes.repeat_interleave(lengths)[None]


def kinds(plan: torch.Tensor, n: int) -> torch.Tensor:
    """A plan (blocks, 4 or 8) as (blocks, n): 0 skipped, 1 visited with mask arithmetic, 2 visited without."""
    classes = torch.zeros(len(plan), n, dtype=torch.long)
    for block, row in enumerate(plan.tolist()):
        for lo, full_lo, full_hi, hi in (row[:4], row[4:]) if len(row) == 8 else (row,):
            for other in range(lo, hi):
                classes[block, other] = max(int(classes[block, other]), 2 if full_lo <= other < full_hi else 1)
    return classes


def panel(axes, visible: torch.Tensor, blocks: torch.Tensor | None, title: str) -> None:
    """Visible pairs as dark cells over the blocks' colours."""
    length = len(visible)
    if blocks is not None:
        for (row, column), kind in zip(torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape)).tolist(),
                                       blocks.flatten().tolist(), strict=True):
            axes.add_patch(Rectangle((column * BLOCK - 0.5, row * BLOCK - 0.5), BLOCK, BLOCK, linewidth=0.8,
                                     edgecolor="white", facecolor=(SKIPPED, EDGE, FULL)[kind]))
    shade = ListedColormap([(0, 0, 0, 0), (0.1, 0.15, 0.3, 0.9 if blocks is None else 0.35)])
    axes.imshow(visible, cmap=shade, interpolation="nearest", zorder=2)
    start = 0
    ticks, names = [], []
    for n, _, name in DOCUMENTS:
        ticks.append(start + n / 2 - 0.5)
        names.append(name)
        for line in (axes.axhline, axes.axvline):
            line(start - 0.5, color="#9a9a9a", linewidth=0.4, zorder=1)
        start += n
    axes.set(xlim=(-0.5, length - 0.5), ylim=(length - 0.5, -0.5), title=title, xlabel="keys")
    axes.set_xticks(ticks, names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(length=0)


def main() -> None:
    mask = IntervalMask.shared_prefix(*batch())
    length = mask.first.shape[1]
    visible = mask.dense(length)[0, 0]
    n = -(-length // BLOCK)
    by_query = kinds(mask.plan(length, BLOCK, BLOCK)[0], n)
    by_key = kinds(mask.transposed_plan(length, BLOCK, BLOCK)[0], n).T

    fig, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    panel(axes[0], visible, None, "what each query sees")
    panel(axes[1], visible, by_query, "forward and dQ: each row of blocks is one program")
    panel(axes[2], visible, by_key, "dK and dV: each column of blocks is one program")
    axes[0].set_ylabel("queries")
    handles = [Patch(color=FULL, label="visited, no mask arithmetic"), Patch(color=EDGE, label="visited, masked"),
               Patch(color=SKIPPED, label="skipped: neither loaded nor multiplied")]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(PICTURE, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    main()
