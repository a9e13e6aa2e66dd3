"""Train: `torchrun launch/train.py recipe=draft_stitch [key=value ...]`. `check=true` prints what would run and exits."""

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch.checks import checked, describe, goals, resumable
    from rlstitch.trainer import Trainer

    name, given = cli.recipe_and_overrides(arguments)
    config = checked(given, name)
    if config.check:
        print(describe(config))
        return
    resumable(config)
    cli.announce(goals(config))
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.engine.close()


if __name__ == "__main__":
    cli.main(run)
