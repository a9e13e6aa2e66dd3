"""Steer generation: `python launch/steer.py recipe=fk_stitch prompts=prompts.txt 'judges=[clip, hps]' [key=value ...]`, also under torchrun. Pictures, a captioned grid and
scores.json in steered/NAME, the same on any number of ranks."""

from pathlib import Path

from rlstitch import cli
from rlstitch.telling import means_table, say


def run(arguments: list[str]) -> None:
    from rlstitch import describe, steer

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    config = steer.checked(given, name)
    if config.check:
        return say(describe.steering(config))
    result, folder = steer.run(config), Path(config.out) / config.name
    seconds = ", ".join(f"{kind} {v:.3g} s" for kind, v in result["seconds_per_image"].items())
    say(means_table(result["means"], ("a picture", seconds), ("results", str(folder))))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
