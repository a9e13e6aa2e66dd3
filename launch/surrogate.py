"""Distil a black-box reward into a feed-forward one that can be stitched: `python launch/surrogate.py recipe=surrogate_detector [key=value ...]`."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch import describe
    from rlstitch.stitch import surrogate

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    config = surrogate.checked(given, name)
    if config.check:
        return say(describe.surrogate(config))
    surrogate.run(config)


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
