"""Stitch a value model: `python launch/stitch.py recipe=stitch_clip [key=value ...]`. Search, distil from scratch, measure, save."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch import describe
    from rlstitch.stitch import recipe as stitch

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    config = stitch.checked(given, name)
    if config.check:
        return say(describe.stitching(config))
    stitch.run(config)


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
