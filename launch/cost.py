"""What a run will cost: `python launch/cost.py recipe=draft_stitch_sd35 gpu=h100 [utilisation=0.4] [ranks=8] [tflops=... memory=...] [key=value ...]`.

TFLOP of an update by part, memory of a rank, device-hours. Nothing is loaded but the embedded miniature, on which the recipe's own calls are counted; each is then priced at
the size of the recipe's models, by their configurations alone."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch.costs import report

    name, given = cli.recipe_and_overrides(arguments, script="train.py")
    say(report.told(report.of(given, name), name))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
