"""Distil a black-box reward into a feed-forward one that can be stitched: `python launch/surrogate.py recipe=surrogate_detector [key=value ...]`."""

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch.stitch import surrogate

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    surrogate.run(surrogate.checked(given, name))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
