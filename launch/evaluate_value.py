"""Measure value models and their rivals: `python launch/evaluate_value.py [recipe=evaluate_value] [key=value ...]`, also under torchrun. JSON, a table, plots in values/NAME,
the same figures on any number of ranks."""

from pathlib import Path

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch import describe
    from rlstitch.stitch import compare

    name, given = cli.recipe_and_overrides(arguments, default="evaluate_value", script=__file__)
    config = compare.checked(given, name)
    if config.check:
        return say(describe.comparing(config))
    results = compare.run(config)
    say(compare.table(results["rewards"], config.sigmas), f"written to {Path(config.out) / config.name}")


def main() -> None:
    cli.main(run, default="evaluate_value")


if __name__ == "__main__":
    main()
