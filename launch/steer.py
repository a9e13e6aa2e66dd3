"""Steer generation: `python launch/steer.py recipe=fk_stitch prompts=prompts.txt 'judges=[clip, hps]' [key=value ...]`. Pictures, a captioned grid and scores.json in steered/NAME."""

import json

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch import steer

    name, given = cli.recipe_and_overrides(arguments, script=__file__)
    result = steer.Job(steer.checked(given, name)).run()
    print(json.dumps({k: v for k, v in result.items() if k != "images"}, indent=1))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
