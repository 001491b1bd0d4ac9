"""Trains every stage of one model, in order: `torchrun train.py configs/demo.toml [--section.key=value ...]`.

Finished stages are skipped; an interrupted one continues. Each stage writes only below the run's folder. `--plan` says
what it would take, and trains nothing. `--new my.toml --shards shards/mine` writes a configuration for one's own data.
"""

import sys

from onevocab.common.errors import UserError, cli
from onevocab.pipeline.config import read_config
from onevocab.pipeline.manual import manual
from onevocab.pipeline.new import new_configuration
from onevocab.pipeline.next_steps import next_steps
from onevocab.pipeline.plan import plan_lines
from onevocab.pipeline.run import Run
from onevocab.training import distributed
from onevocab.training.faults import Stopped


@cli
def main() -> None:
    path, *words = sys.argv[1:] or [""]
    if path in ("-h", "--help"):
        print(f"{__doc__}\n`train.py CONFIG --help` lists all settings.")
        return
    if any(word.partition("=")[0] == "--new" for word in (path, *words)):
        new_configuration([path, *words])
        return
    if not path or path.startswith("-"):
        raise UserError("which configuration? For example: torchrun train.py configs/demo.toml")
    help = [word for word in words if word in ("-h", "--help")]
    asked = [word for word in words if word == "--plan" or word.startswith("--plan.")]
    config = read_config(path, [word for word in words if word not in (*asked, *help)])
    if help:
        print(manual(config, path))
        return
    if asked:
        print("\n".join(plan_lines(config, asked)))
        return
    try:
        run = Run(config)
        run.train()
        if run.main:
            print("\n".join(next_steps(config, [*run.kept, *run.trained])))
    except Stopped as stopped:
        if run.main:
            print(stopped, file=sys.stderr)
    finally:
        distributed.finish()
    distributed.leave()


if __name__ == "__main__":
    main()
