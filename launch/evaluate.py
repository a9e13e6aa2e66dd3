"""Evaluate a run again: `python launch/evaluate.py run=runs/draft_stitch [key=value ...]`, also under torchrun. Full denoising, clean rewards, detector.
`lora=PATH` evaluates the run's model with that LoRA instead of the run's weights."""

from rlstitch import cli
from rlstitch.telling import means_table, say


def run(arguments: list[str]) -> None:
    from rlstitch.checks import checked
    from rlstitch.describe import evaluating
    from rlstitch.files import write_json
    from rlstitch.trainer import Trainer

    folder, given, lora = cli.run_and_overrides(arguments)
    config = checked(given, str(folder / "recipe.yaml"))
    if config.check:
        return say(evaluating(folder, config, lora))
    trainer = Trainer(config)
    try:
        results = trainer.evaluate_start() if lora else trainer.evaluate_checkpoint(folder)
        if trainer.engine.is_main:
            write_json(folder / "evaluation.json", results)
            say(means_table(results, ("written to", str(folder / "evaluation.json"))))
    finally:
        trainer.engine.close()


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
