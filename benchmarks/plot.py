"""A results file of the harness as a Markdown table and a picture: roofline and speed-up.

    python -m benchmarks.plot benchmarks/results/attention-cpu.json

Writes the same name with .md and .png. The table needs nothing; the picture needs matplotlib.
"""

import argparse
from pathlib import Path

from benchmarks.work import LONG_TO_SHORT, OURS
from onevocab.common.errors import UserError, cli
from onevocab.common.files import read_json, write_atomic

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
OUR_COLOUR = "#c44e52"


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}{unit}"


def markdown(result: dict) -> str:
    """All presets of one file as tables."""
    versions = result["versions"]
    lines = [
        f"# {result['benchmark']}: {result['device']}", "",
        f"{result['date']}, commit {result['commit']}, "
        + ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton") if name in versions)
        + (f", CUDA {result['cuda']}" if result.get("cuda") else "") + f". `{result['command']}`", "",
        "FLOP/s and bytes/s are of the work that has to be done; memory is what a call allocates at its peak, results "
        "included; the ratio is a median over neighbouring repetitions."
        + (" *process*: what steps add to a process of their own, optimiser's state and libraries' scratch included."
           if any("process_bytes" in row for preset in result["presets"].values() for row in preset["rows"]) else ""),
    ]
    if result["device_type"] == "cpu":
        lines += ["", "**On a CPU: these are the CPU's paths, not the Triton kernels.**"]
    for title, preset in result["presets"].items():
        shape = ", ".join(f"{key} {value}" for key, value in preset["shape"].items())
        lines += ["", f"## {title}", "", f"{preset['description']}: {shape}, {preset['dtype']}. "
                  + " ".join(f"{note}." for note in preset["notes"])]
        ceilings = preset["ceilings"]
        if ceilings:
            lines += ["", f"Measured ceilings: copy {number(ceilings['copy_bytes_per_second'] / 1e9)} GB/s, matmul "
                      f"{number(ceilings['matmul_flops_per_second'] / 1e12)} TFLOP/s. Chosen: {preset['backend']}."]
        counts_tokens = any("tokens_per_second" in row for row in preset["rows"])
        processes = any(row.get("process_bytes") is not None for row in preset["rows"])
        if preset["rows"]:
            lines += ["", "| step | provider | ms | time / ours | TFLOP/s | of matmul | GB/s | of copy | peak MiB |"
                      + " process, MiB |" * processes + " tokens/s |" * counts_tokens,
                      "|---|---|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * (counts_tokens + processes)]
        for row in preset["rows"]:
            flops, moved = row["flops_per_second"], row["bytes_per_second"]
            lines.append("| " + " | ".join([
                LONG_TO_SHORT.get(row["step"], row["step"]),
                f"**{row['provider']}**" if row["provider"] == OURS else row["provider"],
                number(row["seconds"] * 1e3), number(row["times_ours"]), number(flops / 1e12),
                f"{flops / ceilings['matmul_flops_per_second']:.0%}", number(moved / 1e9),
                f"{moved / ceilings['copy_bytes_per_second']:.0%}", number(row["peak_bytes"] / 2**20),
                *([number(row["process_bytes"] / 2**20 if row.get("process_bytes") is not None else None)]
                  if processes else []),
                *([number(row["tokens_per_second"])] if counts_tokens else []),
            ]) + " |")
        for target in preset["targets"]:
            wanted = (f"at least {target['at_least']}" if target["at_most"] is None else f"at most {target['at_most']}")
            against = f" against {' or '.join(target['against'])}" if target["against"] else ""
            verdict = {True: "met", False: "not met", None: "not measured"}[target["met"]]
            step = LONG_TO_SHORT.get(target["step"], target["step"])
            lines += ["", f"- Target: {target['quantity']}, {step}{against}: {wanted}; "
                      f"measured {number(target['measured'])}: {verdict}."]
        for peer, reason in preset["not_run"].items():
            lines += ["", f"- Not run: {peer}: {reason}"]
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """Left: achieved FLOP/s over arithmetic intensity, under the measured ceilings. Right: times over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    presets = {title: preset for title, preset in result["presets"].items() if preset["rows"]}
    if not presets:
        raise UserError("nothing was timed: there is nothing to draw")
    peers = list(dict.fromkeys(row["provider"] for preset in presets.values() for row in preset["rows"]))
    peers.sort(key=lambda name: name != OURS)
    colours = {name: OUR_COLOUR if name == OURS else COLOURS[i % len(COLOURS)] for i, name in enumerate(peers)}
    groups = [(title, step) for title, preset in presets.items()
              for step in dict.fromkeys(row["step"] for row in preset["rows"])]
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, max(4.5, 0.32 * len(groups) + 2)), layout="constrained")

    shown: set[str] = set()
    for preset in presets.values():
        limits = preset["ceilings"]["copy_bytes_per_second"], preset["ceilings"]["matmul_flops_per_second"]
        intensities = [row["flops"] / row["bytes"] for row in preset["rows"]]
        ends = min(intensities) / 4, limits[1] / limits[0], max(*intensities, limits[1] / limits[0]) * 4
        if preset["dtype"] not in shown:
            label = f"measured ceilings, {preset['dtype']}: copy, matmul"
            left.plot(ends, [min(limits[0] * x, limits[1]) for x in ends], color="black", linewidth=1, label=label,
                      linestyle=("-", "--", ":")[len(shown) % 3])
            shown.add(preset["dtype"])
        for row in sorted(preset["rows"], key=lambda row: row["provider"] == OURS):  # ours on top
            left.plot(row["flops"] / row["bytes"], row["flops_per_second"], "o", markersize=7 if row["provider"] == OURS
                      else 5, color=colours[row["provider"]], markeredgecolor="white")
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte that has to move", ylabel="FLOP/s", title="Roofline")
    left.legend(loc="lower right", frameon=False)
    left.grid(alpha=0.2)

    for y, (title, step) in enumerate(groups):
        for row in presets[title]["rows"]:
            if row["step"] == step:
                right.plot(row["times_ours"], y, "o", markersize=7 if row["provider"] == OURS else 6,
                           color=colours[row["provider"]], markeredgecolor="white")
    right.axvline(1, color=OUR_COLOUR, linewidth=1)
    right.set(xscale="log", xlabel="time / time of ours (right of the line: ours is faster)", title="Speed-up")
    right.set_yticks(range(len(groups)), [f"{title}, {LONG_TO_SHORT.get(step, step)}" for title, step in groups])
    right.set_ylim(len(groups) - 0.5, -0.5)
    for axis in (right.xaxis.set_major_formatter, right.xaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}x" if f"{value:.0e}"[0] in "125" else "")
    right.grid(alpha=0.2)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in peers]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(peers), 4), frameon=False)
    kind = "the CPU's paths on " if result["device_type"] == "cpu" else ""
    fig.suptitle(f"{result['benchmark']}: {kind}{result['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def publish(path: Path) -> list[Path]:
    """Writes the table and, where matplotlib is installed, the picture beside a results file; returns their paths."""
    result = read_json(path)
    if not isinstance(result, dict) or "presets" not in result:
        raise UserError(f"{path} is not a results file of this harness")
    write_atomic(path.with_suffix(".md"), markdown(result))
    written = [path.with_suffix(".md")]
    try:
        draw(result, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    except ImportError:
        print(f"matplotlib is not installed: no picture; later: python -m benchmarks.plot {path}")
    return written


@cli
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files")
    for path in parser.parse_args(argv).results:
        print("written: " + ", ".join(str(each) for each in publish(path)))


if __name__ == "__main__":
    main()
