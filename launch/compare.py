"""Compare training runs and evaluations on one page: `python launch/compare.py runs/a runs/b ... [out=comparison.html]`. Curves against device-hours with the seeds of one
recipe averaged, a table with differences and standard errors, the same prompts' pictures side by side, and where the recipes differ."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch import comparison

    say(comparison.run(arguments))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
