"""Hold a reward to what every reward has to keep: `python launch/check_reward.py reward=pickscore [prompts=FILE pictures=FOLDER count=4]`, a recipe of recipes/reward/, a path to one
of yours, or a class, `reward=mine.Reward`. It moves with prompt and picture, a batch is its pictures one by one, its gradient is that of finite differences, ...; exit 2 where one fails."""

from pathlib import Path

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch import config as cfg
    from rlstitch import reward_check
    from rlstitch.protocols import look_in

    look_in(Path.cwd())
    reward_check.run(cfg.parse_overrides(arguments))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
