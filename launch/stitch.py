"""Stitch a value model: `python launch/stitch.py recipe=stitch_clip [key=value ...]`. Search, distil from scratch, measure, save."""

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch.stitch import recipe as stitch

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    stitch.run(stitch.checked(given, name))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
