"""All targets beside what was measured, as Markdown."""

from benchmarks.plot import number
from benchmarks.work import LONG_TO_SHORT


def targets_table(results: dict[str, dict]) -> str:
    """name -> a results file of the harness; a row for each of its targets."""
    lines = ["| results | what | against | target | measured | |", "|---|---|---|--:|--:|---|"]
    for name, result in results.items():
        for title, preset in result["presets"].items():
            for target in preset["targets"]:
                wanted = f">= {target['at_least']}" if target["at_most"] is None else f"<= {target['at_most']}"
                ceiling = "data sheet" if target["quantity"] == "mfu" else "copy bandwidth"
                against = " or ".join(target["against"]) or ceiling
                step = LONG_TO_SHORT.get(target["step"], target["step"])
                verdict = {True: "met", False: "not met", None: "not measured"}[target["met"]]
                lines.append(f"| {name}, {title} | {target['quantity']}, {step} | {against} | {wanted} | "
                             f"{number(target['measured'])} | {verdict} |")
    return "\n".join(lines) + "\n"


def page(label: str, results: dict[str, dict], outcomes: list[tuple[str, float, str]], failed: list[str]) -> str:
    """The page of one run: targets, what came of each step (name, seconds, words), what failed."""
    commits = {result["commit"] for result in results.values()}
    lines = [f"# {label}, commit {', '.join(sorted(map(str, commits))) or 'unknown'}", "", targets_table(results),
             "| step | s | |", "|---|--:|---|"]
    lines += [f"| {name} | {seconds:.0f} | {' '.join(words.replace('|', '/').split())} |"
              for name, seconds, words in outcomes]
    return "\n".join([*lines, "", *(f"- Failed: {problem}" for problem in failed)]) + "\n"
