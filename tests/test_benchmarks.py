"""Benchmarks that must run anywhere: the real-size script on a tiny configuration and its FLOP floors, the passes that an update needs."""

import json

import pytest

from benchmarks import common, paper_tables, real_parts, real_size, search_speed, steering, step_floor, stitch_cost


@pytest.mark.parametrize("pixels, wanted", [(512, (2.44, 0.46, 2.51, 1.01)), (1024, (11.25, 2.21, 10.47, 1.01))])
def test_floors_of_sd35_medium_are_the_counted_ones(pixels, wanted):
    found = real_parts.floors("sd35_medium", pixels, 4)
    assert tuple(round(found[k], 2) for k in ("denoiser", "prefix", "decode", "reward")) == wanted


def test_the_cost_of_stitching_is_that_of_its_parts(monkeypatch):
    """By hand on a tiny configuration: what is run in the search, once a picture, and for every picture that is seen."""
    tiny, width, inner, layers = real_parts.SIZES["tiny"], 16, 32, 5
    monkeypatch.setattr(stitch_cost, "KL", tiny["vae"])
    monkeypatch.setitem(stitch_cost.MODELS, "tiny", (stitch_cost.sd3, tiny["transformer"], None, tiny["tokens"]))
    vision = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2, projection_dim=8)
    monkeypatch.setattr(stitch_cost, "REWARDS", {"clip": vision})
    found = stitch_cost.cost("tiny", 16)
    row, parts = found["rewards"]["clip"], [real_parts.floors("tiny", 16, k)["prefix"] for k in (1, 3)]
    assert row["first"]["blocks"] == row["sixth"]["blocks"] == row["half"]["blocks"] == 1 and found["blocks"] == 3
    assert row["first"]["prefix"] == pytest.approx(parts[0], rel=1e-6)
    tokens, patches = 257, 2 * 256 * width * 3 * 14**2 / 1e12
    block = (2 * tokens * width * (4 * width + 2 * inner) + 4 * tokens**2 * width) / 1e12
    assert row["search_tflop"] / 200 == pytest.approx(found["encoder_tflop"] + parts[1] + patches + 3 * block, rel=1e-3)
    assert row["once_a_picture_tflop"] == pytest.approx(found["encoder_tflop"] + patches + layers * block, rel=1e-3)
    assert row["first"]["tail"] == pytest.approx(3 * layers * block, rel=0.1)
    assert row["fits_tflop_float64"] == pytest.approx(3 * (2 * 200 * 256 * 16 * (16 + 64) + 16**3 / 3 + 4 * 16**2 * 64) / 1e12)
    assert row["first"]["finetune_hours"] == pytest.approx(row["first"]["finetune_tflop"] / 395.6 / 3600)


def test_the_search_is_the_naive_least_squares_of_every_pair(monkeypatch):
    monkeypatch.setattr("sys.argv", ["search_speed", "images=50"])
    monkeypatch.setattr(search_speed, "save", lambda name, found: told.update(found))
    told = {}
    search_speed.main()
    assert told["images"] == 50 and told["pairs"] == len(told["table"]) and told["largest_difference_of_losses"] < 1e-8


def test_real_size_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Every case is kept as it comes, its time first; the second run measures what the first was stopped at, and a third nothing. TFLOP are those of the parts."""
    path, rows, kept = real_parts.write(tmp_path, "tiny", "cpu", real_size.precision()), {}, []

    def keep():
        kept.append({what: "memory_ratio" in row for what, row in rows.items()})
        if len(kept) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        real_size.measure("tiny", 16, 1, 1, "", rows, keep, folder=path)
    assert kept[:3] == [{"query forward": False}, {"query forward": True}, {"query forward": True, "query gradient": False}]
    assert [*kept[-1].items()][-1] == ("DRaFT-1 update", False)
    first = {what: row["pixel_seconds"] for what, row in rows.items()}
    real_size.measure("tiny", 16, 1, 1, "", rows, lambda: kept.append(0), folder=path)
    assert list(rows) == [*real_size.STEERING, *real_size.UPDATES] and len(kept) == 9 + 3
    assert first.items() <= {what: row["pixel_seconds"] for what, row in rows.items()}.items()
    monkeypatch.setattr(real_size, "load", lambda *_: pytest.fail("built again"))
    real_size.measure("tiny", 16, 1, 1, "", rows, folder=path)
    parts = real_parts.floors("tiny", 16, 1)
    query, draft, nft = (rows[what] for what in ("query forward", "DRaFT-1 update", "NFT update"))
    assert query["pixel_tflop"] == pytest.approx(parts["denoiser"] + parts["decode"] + parts["reward"], abs=2e-6)
    assert query["stitched_tflop"] == pytest.approx(parts["prefix"] + parts["reward"], rel=0.1, abs=2e-6)
    for row, images in ((draft, 1), (nft, 2)):  # five steps of the rollout more, a decoder and a reward for a prefix and a tail
        assert row["pixel_tflop"] - row["stitched_tflop"] > images * (5 * parts["denoiser"] + parts["decode"] - parts["prefix"]) * 0.9
        assert row["of_the_tflop_ratio"] == pytest.approx(row["times_faster"] / row["tflop_ratio"], abs=2e-3)


def test_real_sizes_table_has_what_is_known(tmp_path, monkeypatch):
    """Two pictures of a row: by hand 8 TFLOP in 4 s, 2 in 2, of a roof of 4 TFLOP/s; the memory of the second is not there yet."""
    row = dict(
        pixel_seconds=4.0,
        stitched_seconds=2.0,
        pixel_tflop=8.0,
        stitched_tflop=2.0,
        times_faster=2.0,
        tflop_ratio=4.0,
        of_the_tflop_ratio=0.5,
    )
    weighed = row | dict(pixel_megabytes=1000.0, stitched_megabytes=250.0, memory_ratio=0.25)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    told = {"hardware": "here", "precision": "bfloat16", "blocks": 4, "roof_tflops": 4.0}
    real_size.tell("t", told | {"by_pixels": {"512": {"DPS step": weighed, "NFT update": row, "query": {"hardware": "here"}}}})
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[2] == "| 512 px, DPS step | 4 | 2 | 2.00 | 4.00 | 0.50 | 0.50 / 0.25 | 1,000 / 250 | 0.25 |"
    assert lines[3].endswith("| 0.50 / 0.25 |  |  |") and len(lines) == 6


def test_step_floor_counts_the_passes_of_an_update(tmp_path):
    """DRaFT-1 + StitchVM stopped after 7 steps, the middle of 6 to 9: 6 forwards without gradient, 1 with (it needs none to its latent), 1 of the base, 1 value query."""
    row = step_floor.measure("draft_stitch", 2, 1, tmp_path)
    assert {p["call"]: p["count"] for p in row["passes"]} == {
        "velocity 2 default False False": 6,
        "velocity 2 default True False": 1,
        "velocity 2 reference False False": 1,
        "oracle 2 True": 1,
    }
    assert row["ratio"] == pytest.approx(row["update_seconds"] / row["floor_seconds"], rel=0.05)


def test_time_to_a_rivals_reward_is_interpolated():
    points = [(0.0, 1.0), (1.0, 1.2), (2.0, 1.6)]
    assert paper_tables.hours_to(points, 1.4) == pytest.approx(1.5)
    assert paper_tables.hours_to(points, 1.2) == pytest.approx(1.0)
    assert paper_tables.hours_to(points, 2.0) is None


def test_curves_are_of_training_alone_and_averaged_evaluation_by_evaluation(tmp_path):
    """Seeds spend .1 and .3 hours until the second evaluation and reach 1.2 and 1.4 there: .2 hours and 1.3 in the mean; the stitching's .25 stays out."""
    for seed, (spent, gained) in enumerate(((0.1, 0.2), (0.3, 0.4))):
        (tmp_path / str(seed)).mkdir()
        rows = [
            {"step": step, "eval": {"clip": 0.5 + share * gained, "hps": 0.5},
             "cpu_hours": {"total": 0.25 + share * spent, "rollout": share * spent, "oracle": 0.0, "update": 0.0, "refresh": 0.0}}
            for step, share in ((0, 0), (20, 1))
        ]  # fmt: skip
        rows.insert(1, {"step": 1, "rewards": {"clip": 0.5}, "cpu_hours": rows[0]["cpu_hours"]})
        (tmp_path / str(seed) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [tmp_path / "0", tmp_path / "1"]
    assert paper_tables.mean_curve(runs, "reward") == [pytest.approx((0.0, 1.0)), pytest.approx((0.2, 1.3))]
    assert paper_tables.curve(runs[0], "clip") == [pytest.approx((0.0, 0.5)), pytest.approx((0.1, 0.7))]
    assert paper_tables.reach(*(paper_tables.curve(run, "reward") for run in reversed(runs))) == {
        "reward": 1.2,
        "rival_hours": 0.1,
        "share": 1.5,
    }
    assert paper_tables.reach(*(paper_tables.curve(run, "reward") for run in runs))["share"] is None  # 1.4 is never reached


def test_the_cost_of_a_full_solve_leaves_the_first_update_out(tmp_path):
    """Updates of 20 (all full solves), 2, 4 (full), 2 seconds: 2, 4, and 2 / (.9 x 2 + .1 x 4) of the speed."""
    rows, at = [], 0.0
    for step, (seconds, full) in enumerate(((20, True), (2, False), (4, True), (2, False)), 1):
        at += seconds / 3600
        hours = {"rollout": at / 2, "oracle": at / 2, "update": 0.0, "refresh": 0.0, "eval": 9.0}
        rows.append({"step": step, "loss": 0.0, **({"worst_cosine": 0.1} if full else {}), "cpu_hours": hours})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = paper_tables.cost_of_full_solves([tmp_path])
    assert found == {"seconds_plain": 2.0, "seconds_with_full_solve": 4.0, "speed_at_every_10": round(2 / 2.2, 4)}


def test_tables_are_markdown_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.table("t", ["", "a"], [["row", common.spread([1.0, 3.0], 1)]], "Two seeds.")
    assert (tmp_path / "t.md").read_text() == "|  | a |\n|---|---|\n| row | 2.0 ± 1.4 |\n\nTwo seeds.\n"


def test_rows_of_seeds_that_run_at_once_are_all_kept(tmp_path, monkeypatch):
    """The second is kept while the first is made, and what is there is not made again."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    made = common.row("t", "seed 0", lambda: {"a": common.row("t", "seed 1", lambda: {"a": 1})["a"] + 1})
    held = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert set(held) == {"seed 0", "seed 1"} and held["seed 0"] == made and made["a"] == 2
    assert common.row("t", "seed 1", lambda: pytest.fail("made again")) == held["seed 1"]


def test_steering_jobs_scale_the_schedule_and_are_kept(tmp_path, monkeypatch):
    """A quarter of the 40 steps of FK: resampling at 6 and 8 for 24 and 32. The second time a result comes from disk."""
    options = {"reward": "clip", "prompts": "1", "out": str(tmp_path), "steps": "10", "threads": "0", "seeds": "0"}
    bench = steering.Bench(options)
    assert bench.recipe("fk_stitch", {"num_particles": 2})["method"]["resample_steps"] == [6, 8]
    row = bench.over_seeds("fk_stitch", num_particles=2)
    assert row["clip_stdev"] is None and -1 <= row["clip"] <= 1 and row["seconds_per_image"] > 0
    monkeypatch.setattr(steering.steer.Job, "run", lambda self: pytest.fail("run again"))
    assert bench.over_seeds("fk_stitch", num_particles=2) == row
