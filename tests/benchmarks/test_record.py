"""benchmarks/record.py: several seeds of one path, resumed, with failures; and what is committed of them."""

import importlib.util
import json
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT

from benchmarks import record

ROW = {"task": "vqa", "split": "held out", "metric": "answers right", "interval": [0, 1], "chance": 0.1,
       "ceiling_original": None, "ceiling_tokenizer": None, "n": 64}


@pytest.fixture
def machine(monkeypatch):
    """A machine that trains at once: seed 2's evaluation fails as long as `broken`; all commands are kept."""
    state = SimpleNamespace(commands=[], broken=True)

    def run(command, cwd):
        state.commands.append(command)
        training = next((word for word in command if word.startswith("--folder=")), None)
        folder = record.Path(training.removeprefix("--folder=") if training else command[-1])
        seed = int(folder.name.rpartition("-")[2])
        if training:
            for name in ("shards", "instruct"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / "done.json").write_text("{}")
            if not (folder / "shards" / "a.tar").exists():
                (folder / "shards" / "a.tar").write_bytes(b"shard")
            line = {"stage": "instruct", "step": 9, "loss_text": 0.5 + seed}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            return subprocess.CompletedProcess(command, 0)
        if seed == 2 and state.broken:
            return subprocess.CompletedProcess(command, 3)
        report = {"device": "a CPU", "versions": {"python": "3.11"}, "config": {}, "notes": [], "judges": {},
                  "seconds": {"shards": 1.0, "instruct": 10.0 + seed},
                  "results": [ROW | {"value": 0.5 + seed / 10}, ROW | {"metric": "none", "value": None}]}
        (folder / "report").mkdir(exist_ok=True)
        (folder / "report" / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(record, "subprocess", SimpleNamespace(run=run))
    return state


def test_a_record_of_three_seeds(machine, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "demo.json", ["--model.dim=64"]
    call = [str(ROOT / "configs" / "demo.toml"), "--seeds", "3", "--folder", str(tmp_path), "--out", str(out), *words]
    with pytest.raises(SystemExit):
        record.main(call)
    assert "seed 2 (exit 3" in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1, 2] and "failed" in found["seeds"][2]
    assert [row["values"] for row in found["results"]] == [[0.5, 0.6]]
    trained = [command for command in machine.commands if "--model.dim=64" in command]
    assert [word for command in trained for word in command if word.startswith("--seed=")] == \
        ["--seed=0", "--seed=1", "--seed=2"]
    shards = [tmp_path / f"demo-{seed}" / "shards" / "a.tar" for seed in range(3)]
    assert all(path.samefile(shards[0]) for path in shards)  # made once

    machine.broken, done = False, len(machine.commands)
    record.main(call)
    assert all("demo-2" in " ".join(command) for command in machine.commands[done:])  # what is there is not done again
    found = json.loads(out.read_text())
    (row,) = found["results"]
    assert (row["value"], row["interval"], row["n"]) == (0.6, [0.5, 0.7], 64)
    assert found["seconds"] == {"shards": 1.0, "instruct": 11.0}
    assert found["seeds"][1]["losses"] == {"instruct": {"step": 9, "text": 1.5}}

    spec = importlib.util.spec_from_file_location("update_results", ROOT / "docs" / "update_results.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    table = pages.table({"demo": found})
    assert "| 0.600 (0.500 to 0.700) |" in table and "Median (lowest to highest) of seeds 0, 1, 2" in table


def test_what_a_record_does_not_take(tmp_path, capsys):
    for words, message in ((["configs/nosuch.toml"], "there is no configs/nosuch.toml"),
                           ([str(ROOT / "configs/demo.toml"), "--seed=3"], "the seeds are --seeds"),
                           ([str(ROOT / "configs/demo.toml"), "--seeds", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            record.main([*words, "--folder", str(tmp_path)])
        assert message in capsys.readouterr().err
