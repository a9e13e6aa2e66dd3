"""The clock of device-hours."""

import pytest

from rlstitch import metrics


def test_every_second_counts_once_for_every_rank_and_phases_within_phases_by_themselves(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = metrics.Clock(3)
    now[0] += 5
    clock.begin({"update": 2.0})
    now[0] += 1
    with pytest.raises(KeyError), clock.phase("eval"):
        now[0] += 20
        with clock.phase("rollout"):
            assert clock.now == "rollout"
            now[0] += 40
        now[0] += 7
        raise KeyError
    now[0] += 2
    spent = {k: v * 3600 / 3 for k, v in clock.hours.items() if v}
    assert spent == pytest.approx({"setup": 5, "wait": 3, "eval": 27, "rollout": 40, "update": 2400})
    assert clock.now == "wait" and clock.row[clock.unit]["total"] * 3600 / 3 == pytest.approx(2443)
