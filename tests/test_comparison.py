"""Several runs or evaluations on one page: seeds averaged, differences paired, settings that differ told."""

import json

import pytest

from rlstitch import comparison
from rlstitch.types import UserError


def run_folder(root, name, *, seed=0, oracle="Stitched", shift=0.0, stitching=0.5):
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "ema.png").write_bytes(b"png")
    (folder / "recipe.yaml").write_text(
        f"name: {name}\nseed: {seed}\nalgorithm: {{_target_: rlstitch.algorithms.nft.NFT}}\noracle: {{_target_: rlstitch.oracles.{oracle}}}\nevaluation: {{num_steps: 40}}\n"
    )
    rows = [{"step": k, "eval": {"clip": 0.5 + 0.1 * k + shift}, "gpu_hours": {"total": stitching + k}} for k in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = {"base": {"clip": 0.5}, "ema": {"clip": 0.7 + shift, "clip/easy": 1.0}}
    (folder / "summary.json").write_text(json.dumps({"eval": ends, "device_hours": {"stitching": stitching}}))
    return str(folder)


def evaluation_folder(root, name, scores, **settings):
    folder = root / name
    folder.mkdir()
    (folder / "recipe.yaml").write_text("layout: flat\n")
    known = [s for s in scores if s is not None]
    told = {"model": {"path": name}, "sampling": {"images_per_prompt": 2, "num_steps": 40} | settings}
    (folder / "evaluation.json").write_text(
        json.dumps({"means": {"clip": sum(known) / len(known)}, "settings": told, "scores": {"clip": scores}})
    )
    return str(folder)


def test_seeds_are_averaged_and_hours_begin_with_training(tmp_path):
    folders = [
        run_folder(tmp_path, "nft-0"),
        run_folder(tmp_path, "nft-1", seed=1, shift=0.2),
        run_folder(tmp_path, "pixel", oracle="Terminal", stitching=0.0),
    ]
    told = comparison.run([*folders, f"out={tmp_path / 'page.html'}"])
    lines = [line.split() for line in told.splitlines()]
    assert (
        ["base", "0.5"] in lines and ["nft", "(2", "seeds)", "0.8", "±", "0.14", "2", "±", "0"] in lines and ["pixel", "0.7", "2"] in lines
    )
    assert "value models were stitched before, once: 0.5 gpu-hours" in told
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polygon") == 1 and page.count("stroke-dasharray") == 1  # a band over the seeds; the pixel run is dashed
    assert "rlstitch.oracles.Terminal" in page and "<td>seed</td>" not in page and "gpu-hours of training" in page
    mean, low, high = comparison.averaged([[(0, 0), (2, 2)], [(1, 3), (3, 5)]])
    assert mean == [(1, 2.0), (2, 3.0)] and low == [(1, 1.0), (2, 2)] and high == [(1, 3), (2, 4.0)]


def test_evaluations_are_compared_prompt_by_prompt(tmp_path):
    first = evaluation_folder(tmp_path, "a", [0.1, 0.3, 0.5, 0.7])
    second = evaluation_folder(tmp_path, "b", [0.2, 0.4, 0.8, 1.0])
    other = evaluation_folder(tmp_path, "c", [0.2, None, 0.8, 1.0], num_steps=20)
    told = comparison.run([first, second, other, f"out={tmp_path / 'page.html'}"])
    # differences by prompt .1 and .3: their mean, and its error .1414 / sqrt(2)
    assert [line.split() for line in told.splitlines() if line.startswith("  - a")] == [["-", "a", "+0.2", "±", "0.1"], ["-", "a", "-"]]
    assert "a and c differ in sampling.num_steps: 40 and 20" in told and "a and b differ" not in told


def test_what_cannot_be_compared_is_told_at_once(tmp_path):
    going = tmp_path / "going"
    (going / "checkpoints").mkdir(parents=True)
    (going / "recipe.yaml").write_text("name: going\n")
    with pytest.raises(UserError, match=r"(?s)none is not there.*no summary.json yet"):
        comparison.run([str(tmp_path / "none"), str(going)])
    for arguments, message in (
        (["a"], "two or more"),
        (["a", "b", "out=x.pdf"], "name an .html file"),
        (["a", "b", "seeds=3"], "unknown option seeds"),
    ):
        with pytest.raises(UserError, match=message):
            comparison.run(arguments)
