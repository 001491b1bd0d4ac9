"""benchmarks/gpu.py, the one command for a GPU, tried without one: its steps, its limits, what it leaves."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import pytest
from conftest import ROOT, run_command

from benchmarks import checkout, gpu, modules, processes, sanitize, steps, targets, train_step
from onevocab.common import provenance
from onevocab.training.config import OptimizerConfig

# What the machine with the GPU need not have.
ABSENT = ("pydantic", "pydantic_core", "tyro", "webdataset", "rustbpe", "soundfile", "matplotlib", "transformers",
          "safetensors", "tiktoken", "PIL", "torchaudio", "tomli_w", "tqdm")
WORKS = """
    import json, os, sys
    path = sys.argv[sys.argv.index("--out") + 1]
    target = {"quantity": "time", "step": "both", "against": ["peer"], "at_least": 2.0, "at_most": None,
              "measured": 2.5, "met": True}
    json.dump({"presets": {"one": {"targets": [target]}}, "commit": os.environ.get("ONEVOCAB_COMMIT")}, open(path, "w"))
    print("measured")
"""
HANGS = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    def waits_for_the_gpu():
        time.sleep(600)
    waits_for_the_gpu()
"""


@pytest.fixture
def own_steps(tmp_path, monkeypatch):
    """Replaces the plan: takes {module's name: its source} and the steps; returns the folder of results."""
    def replace(sources: dict[str, str], *plan: steps.Step):
        folder = tmp_path / "modules"
        folder.mkdir()
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setattr(gpu, "steps", lambda device: (list(plan), []))
        return tmp_path / "out"

    return replace


def command(out, *words: str) -> int:
    """The exit code of the command on a CPU."""
    try:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *words])
    except SystemExit as stop:
        return stop.code
    return 0


def packed(out, name: str) -> str:
    with tarfile.open(out / "results.tgz") as archive:
        return archive.extractfile(name).read().decode()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_fault_or_a_hang_costs_one_step(own_steps, capsys):
    """What hangs is ended with its children and says where it stood; what comes after it runs; two files are left."""
    out = own_steps({"works": WORKS, "hangs": HANGS, "fails": "raise SystemExit('cannot')"},
                    steps.Step("hang", "waits", 2, (("hangs",),), False),
                    steps.Step("pair", "side by side", 20, (("fails",), ("fails", "again")), False),
                    steps.Step("last", "measures", 20, (("works",),)))
    assert command(out) == 1
    assert sorted(path.name for path in out.iterdir()) == ["log", "results.tgz"]
    page, log = packed(out, "targets.md"), (out / "log").read_text()
    assert "| last-cpu-tiny, one | time, forward + backward | peer | >= 2.0 | 2.50 | met |" in page
    assert "- Failed: hang: hangs: not finished within 2 s" in page
    assert "- Failed: pair: fails again: exit 1" in page and "2 of 2 failed: exit 1: cannot" in page
    assert json.loads(packed(out, "last-cpu-tiny.json"))["presets"] and "measured" in packed(out, "last.log")
    assert "waits_for_the_gpu" in packed(out, "hang.log") and "cannot" in log and "waits_for_the_gpu" in log
    child = int(packed(out, "hang.log").split()[1])
    assert not alive(child)
    assert "problem: pair: fails: exit 1" in capsys.readouterr().err


def test_steps_for_which_there_is_no_time_are_named_and_no_fault(own_steps):
    out = own_steps({"works": WORKS, "hangs": HANGS},
                    steps.Step("long", "has less than it takes", 4, (("hangs",),), False),
                    steps.Step("longer", "not begun", 600, (("works",),)))
    assert command(out, "--minutes", "0.05") == 0
    page = packed(out, "targets.md")
    assert "| longer | 0 | left out: no time |" in page and "not finished within 3 s" in page and "Failed" not in page


def test_a_signal_ends_the_step_and_keeps_what_there_is(own_steps):
    out = own_steps({"works": WORKS, "hangs": HANGS}, steps.Step("first", "measures", 20, (("works",),)),
                    steps.Step("hang", "waits", 600, (("hangs",),), False))

    def stop():
        while not (out / "log").exists() or "hang:" not in (out / "log").read_text():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=stop)
    sender.start()
    assert command(out) == "ended by SIGTERM"
    sender.join()
    assert "measured" in packed(out, "first.log") and "first-cpu-tiny" in packed(out, "targets.md")
    assert "child" in packed(out, "hang.log")


def test_results_say_which_commit_a_copy_is_of(own_steps, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "copy" / "common" / "provenance.py"))
    (tmp_path / "copy").mkdir()
    monkeypatch.setenv(provenance.COMMIT, "")
    assert provenance.commit() is None
    out = own_steps({"works": WORKS}, steps.Step("one", "measures", 20, (("works",),)))
    assert command(out, "--commit", "0123abc") == 0
    assert json.loads(packed(out, "one-cpu-tiny.json"))["commit"] == "0123abc" == provenance.commit()
    assert "commit 0123abc" in (out / "log").read_text() and "commit 0123abc" in packed(out, "targets.md")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # somebody's repository around the copy is not ours
    subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty",
                    "-m", "theirs"], check=True)
    assert provenance.commit() == "0123abc"


def test_another_run_s_results_are_not_overwritten(own_steps, capsys):
    out = own_steps({"works": WORKS}, steps.Step("one", "measures", 20, (("works",),)))
    assert command(out) == 0 and command(out) == 2
    assert "another run" in capsys.readouterr().err
    assert command(out, "--only", "two") == 2 and "choose from one" in capsys.readouterr().err


def test_one_real_step(tmp_path):
    assert command(tmp_path, "--only", "vq") == 0
    assert set(json.loads(packed(tmp_path, "vq-cpu-tiny.json"))["presets"]) == {"small", "wide"}
    assert "ours: error" in packed(tmp_path, "vq.log")


def test_the_steps_and_their_order():
    plan, problems = steps.steps("cuda")
    names = [step.name for step in plan]
    assert not problems and names[:5] == ["checks", "types", "sweep", "attention-causal", "attention-packed"]
    found = names[names.index("attention-other") + 1 : -1]  # as no step names them
    assert names[-1] == "memory" and "shared_prefix" in found
    needed = ("attention-causal-64", "attention-packed-64", "decode", "norms", "cross_entropy", "vq", "train_step")
    assert [name for name in names if name in needed] == list(needed)
    kernels = set(modules.names()) - {"row_length", "shared_prefix", "train_step"}  # these are whole networks
    assert {"attention", "cross_entropy", "decode", "norms", "vq"} <= kernels
    by_name = {step.name: step for step in plan}
    for name in ("checks", "types"):
        assert {words[0].removeprefix("benchmarks.") for words in by_name[name].commands} == kernels
    assert kernels == set(by_name["memory"].commands[0][2:])
    assert set(modules.names()) == {words[0].removeprefix("benchmarks.") for step in plan for words in step.commands
                     if step.measures} - {"sweep"}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_flag_preset_size_and_provider_that_a_step_names_exists(device, capsys):
    known: dict[str, str] = {}
    for step in steps.steps(device)[0]:
        assert step.measures <= (len(step.commands) == 1)
        for module, *words in step.commands:
            name = module.removeprefix("benchmarks.")
            if name not in known:
                with pytest.raises(SystemExit) as stop:
                    importlib.import_module(module).main(["--help"])
                known[name] = capsys.readouterr().out
                assert stop.value.code == 0 and f"python -m {module}" in known[name]
            flags = [word for word in words if word.startswith("--")]
            flags += ["--device", "--tiny", *["--out"] * step.measures]
            assert all(f"{flag} " in known[name] or f"{flag}]" in known[name] for flag in flags), words
            if name not in modules.names():
                continue
            given: dict[str, list[str]] = {}
            for word in words:
                if word.startswith("--"):
                    values = given.setdefault(word, [])
                else:
                    values.append(word)
            presets = modules.presets(name)
            titles = given.get("--preset", list(presets))
            assert set(titles) <= set(presets), words
            shapes = {key for title in titles for key in presets[title].shapes["cuda"]}
            assert {word.partition("=")[0] for word in given.get("--shape", [])} <= shapes, words
            providers = set().union(*(constants(name) for name in ("attention", name)))
            assert set(given.get("--providers", [])) <= providers | {"ours"}, words


def constants(name: str) -> set[str]:
    """The strings that a benchmark's constants hold: its providers' names among them."""
    module = importlib.import_module(f"benchmarks.{name}")
    return {value for key, value in vars(module).items() if key.isupper() and isinstance(value, str)}


def test_a_plan_that_fits_in_a_call():
    """What comes first has its whole limit; nothing after that can take more than the time in all."""
    plan = steps.steps("cuda")[0]
    first = [step.seconds for step in plan[: [step.name for step in plan].index("attention-packed") + 1]]
    assert sum(first) <= 9 * 60 and processes.SIDE_BY_SIDE > 1


def test_once_is_the_same_command_without_make(tmp_path):
    script = ROOT / "benchmarks" / "once.sh"
    environment = {key: value for key, value in os.environ.items() if key != "OUT"} | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "OUT is not set" in done.stderr and not done.stdout
    output = run_command(["bash", script, "--list", "--only", "vq"], env=environment | {"OUT": str(tmp_path)}, cwd="/")
    assert output.startswith("vq: ") and "benchmarks.vq" in output and not list(tmp_path.iterdir())


def test_muon_is_timed_with_its_own_settings():
    assert vars(train_step.OPTIMIZER) == OptimizerConfig().model_dump()


@pytest.mark.parametrize("summary,code,wrong", [("0 errors", 0, False), ("3 errors", 9, True), ("0 errors", 2, True)])
def test_what_the_memory_checker_says(summary, code, wrong, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {summary}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    verdict, found = sanitize.sanitize(["vq"], 30)
    assert found == wrong and summary in verdict


def test_the_page_of_a_run_that_measured_nothing():
    page = targets.page("h100", {}, [("checks", 3.4, "a | b")], ["checks: it fell"])
    assert "commit unknown" in page and "| checks | 3 | a / b |" in page and "- Failed: checks: it fell" in page


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of processes in which nothing of the project is installed, and nothing of ABSENT."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(f"""
        import sys
        sys.meta_path = [f for f in sys.meta_path if "editable" not in (getattr(f, "__module__", "") or "").lower()
                         and "editable" not in repr(f).lower()]
        sys.path = [entry for entry in sys.path if "__editable__" not in entry]
        sys.path_importer_cache.clear()
        sys.modules |= dict.fromkeys({ABSENT})
    """))
    return os.environ | {"PYTHONPATH": str(folder)}


def test_a_plain_checkout_needs_torch_triton_numpy_and_einops(bare):
    """All that the command imports, in itself and in its steps; and an optimiser, as a training step's is made."""
    operations = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/ops_triton.py"))
    script = textwrap.dedent(f"""
        import importlib, sys
        from benchmarks import gpu, sanitize, steps, sweep, train_step
        plan, problems = steps.steps("cuda")
        assert not problems, problems
        for name in {{words[0] for step in plan for words in step.commands}}:
            importlib.import_module(name)
        if importlib.util.find_spec("triton"):
            for name in {operations}:
                importlib.import_module(f"onevocab.kernels.{{name}}.ops_triton")
        import torch
        train_step.muon(torch.nn.Linear(2, 2)).zero_grad()
        try:
            import pydantic
        except ImportError:
            import onevocab
            print(list(onevocab.__path__))
    """)
    output = run_command([sys.executable, "-c", script], env=bare)
    assert output.splitlines()[-1] == str([str(checkout.ROOT)])


@pytest.mark.slow
def test_every_step_from_a_plain_checkout(tmp_path, bare):
    out = tmp_path / "out"
    words = ["--device", "cpu", "--tiny", "--out", out, "--minutes", "20"]
    run_command([sys.executable, "-m", "benchmarks.gpu", *words], env=bare, timeout=1200)
    page = packed(out, "targets.md")
    assert "Failed" not in page and "left out" not in page
    with tarfile.open(out / "results.tgz") as archive:
        written = set(archive.getnames())
    assert {f"{step.name}-cpu-tiny.json" for step in steps.steps("cpu")[0] if step.measures} <= written
