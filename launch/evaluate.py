"""Judge a model, with or without a LoRA, on a prompt set: `python launch/evaluate.py model=NAME prompts=FILE 'rewards=[NAME, ...]' [lora=PATH] [key=value ...]`, also under
torchrun. Scores, every setting that moves them, pictures and a page in evaluations/NAME. model: a recipe of recipes/model, a folder or a hub id; rewards: recipes of
recipes/reward, or what these name. `run=runs/NAME` evaluates a training run again, `lora=PATH` beside it the run's model with that LoRA instead of its weights."""

from rlstitch import cli
from rlstitch.telling import say


def run(arguments: list[str]) -> None:
    from rlstitch import checks, describe, evaluation

    if any(a.startswith("run=") for a in arguments):
        folder, given, lora = cli.run_and_overrides(arguments)
        config = checks.checked(given, str(folder / "recipe.yaml"))
        say(describe.evaluating(folder, config, lora) if config.check else evaluation.again(folder, config, lora))
    else:
        name, given = cli.recipe_and_overrides(arguments, default="evaluate", script=__file__, laid=evaluation.laid)
        config = evaluation.checked(given, name)
        say(describe.judging(config) if config.check else evaluation.table(evaluation.run(config), config))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
