"""Train every part of the `shapes` world from a seed: autoencoder, generators, reward models, prompt splits.

    python launch/pretrain_shapes.py                          # all parts, on 2 cores in about three hours
    python launch/pretrain_shapes.py parts=clip,hps seed=1 out=my_shapes threads=1

Parts are done in order and resume where they stopped (state under <out>/.work). A part that has a card.json is left alone.
"""

import sys
from pathlib import Path

from rlstitch.shapes.pretrain import run

if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:], Path(run.__file__).parents[1] / "weights"))
