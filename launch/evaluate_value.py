"""Measure value models and their rivals: `python launch/evaluate_value.py [recipe=evaluate_value] [key=value ...]`. JSON, a table, plots in values/NAME."""

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch.stitch import compare

    name, given = cli.recipe_and_overrides(arguments, default="evaluate_value", script=__file__)
    config = compare.checked(given, name)
    results = compare.run(config)
    print(compare.table(results["rewards"], config.sigmas))


def main() -> None:
    cli.main(run, default="evaluate_value")


if __name__ == "__main__":
    main()
