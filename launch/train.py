"""Train: `torchrun launch/train.py recipe=draft_stitch [key=value ...]`. `check=true` prints what would run and exits."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch.checks import checked
    from rlstitch.describe import describe, goals
    from rlstitch.resume import resumable
    from rlstitch.trainer import Trainer

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    config = checked(given, name)
    if config.check:
        return say(describe(config))
    resumable(config)
    say(*goals(config))
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.engine.close()


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
