"""Serve a reward over HTTP: `python launch/serve_reward.py recipe=reward/shapes reward=detector [port=8765 host=127.0.0.1]`. A job asks it by `rlstitch.rewards.http.HttpReward`.
A reward that needs an old environment is served from there by rlstitch/rewards/server.py alone."""

from rlstitch import cli
from rlstitch.telling import say
from rlstitch.types import UserError


def run(arguments: list[str]) -> None:
    from rlstitch import serving
    from rlstitch.rewards.server import server_of

    config = serving.checked(*reversed(cli.recipe_and_overrides(arguments, script=__file__)))
    if config.check:
        return say(f"would serve '{config.reward}' ({config.rewards[config.reward]['_target_']}) at http://{config.host}:{config.port}")
    try:
        server = server_of(serving.Served(config), config.reward, config.host, config.port)
    except OSError as error:
        raise UserError(
            f"nothing can be served at {config.host}, port {config.port} ({error.strerror}): choose another port (0 takes a free one)"
        ) from error
    say(f"'{config.reward}' at http://{config.host}:{server.server_port}; Ctrl-C ends it")
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        say("warning: whoever reaches this port may ask it, and nothing is encrypted: keep it behind a firewall")
    with server:
        server.serve_forever()


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
