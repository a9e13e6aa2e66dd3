"""Benchmarks that must run anywhere: the real-size script on a tiny configuration, and its FLOP floors."""

import pytest

from benchmarks import real_size


@pytest.mark.parametrize("pixels, wanted", [(512, (2.44, 0.46, 2.51, 1.01)), (1024, (11.25, 2.21, 10.47, 1.01))])
def test_floors_of_sd35_medium_are_the_counted_ones(pixels, wanted):
    found = real_size.floors("sd35_medium", pixels, 4)
    assert tuple(round(found[k], 2) for k in ("denoiser", "prefix", "decode", "reward")) == wanted


def test_real_size_runs_on_a_tiny_configuration():
    rows = real_size.measure("tiny", 16, 1, 1)
    assert set(rows) == {"query forward", "query gradient", "DPS step", "FK, two steps", "DRaFT-1 update"}
    assert all(row["stitched_seconds"] > 0 and row["pixel_megabytes"] > 0 for row in rows.values())
