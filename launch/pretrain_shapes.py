"""Train every part of the `shapes` world from a seed: autoencoder, generators, reward models, prompt splits.

    python launch/pretrain_shapes.py parts=clip,hps seed=1 out=my_shapes threads=1
    python launch/pretrain_shapes.py out=my_shapes            # all parts, on 2 cores in about three hours
    torchrun --nproc_per_node=2 launch/pretrain_shapes.py parts=shapes threads=1      # the generator on two ranks of one thread, faster than one of two
    torchrun --nproc_per_node=2 launch/pretrain_shapes.py parts=shapes threads=1 init=shapes:shapes out=longer     # go on from shipped weights

Parts are done in order and resume where they stopped (state under <out>/.work). A part that has a card.json is left alone.
"""

from rlstitch import cli


def run(arguments: list[str]) -> None:
    from rlstitch import config as cfg
    from rlstitch.shapes.pretrain import run as pretrain

    pretrain.run(pretrain.checked(cfg.merge({}, cfg.parse_overrides(arguments)), "pretrain_shapes"))


def main() -> None:
    cli.main(run)


if __name__ == "__main__":
    main()
