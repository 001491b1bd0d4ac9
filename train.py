"""Trains every stage of one model, in order: `torchrun train.py configs/demo.toml [--section.key=value ...]`.

Finished stages are skipped; an interrupted one continues. Each stage writes only below the run's folder. `--plan` says
what it would take, and trains nothing. `--new my.toml --shards shards/mine` writes a configuration for one's own data.
"""

import sys

from onevocab.common.errors import UserError, cli
from onevocab.pipeline.config import read_config
from onevocab.pipeline.new import new_configuration
from onevocab.pipeline.plan import plan_lines
from onevocab.pipeline.run import Run
from onevocab.training import distributed
from onevocab.training.faults import Stopped


@cli
def main() -> None:
    arguments = sys.argv[1:]
    if any(word.partition("=")[0] == "--new" for word in arguments):
        new_configuration(arguments)
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError("which configuration? For example: torchrun train.py configs/demo.toml")
    asked = [word for word in arguments[1:] if word.startswith("--plan")]
    config = read_config(arguments[0], [word for word in arguments[1:] if word not in asked])
    if asked:
        print("\n".join(plan_lines(config, asked)))
        return
    try:
        run = Run(config)
        run.train()
        if run.main:
            print(f"done: {run.folder}. Try: python sample.py {run.folder} --chat; "
                  f"evaluate: python -m onevocab.evaluation {run.folder}")
    except Stopped as stopped:
        if run.main:
            print(stopped, file=sys.stderr)
    finally:
        distributed.finish()
    distributed.leave()


if __name__ == "__main__":
    main()
