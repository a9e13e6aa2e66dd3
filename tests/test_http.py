"""A reward behind HTTP: scores as if it were here; every way in which a service can fail is NaN and told, or ends a job before it begins."""

import ast
import datetime
import math
import threading
import time
from pathlib import Path

import pytest
import torch

from launch import serve_reward as launcher
from rlstitch import serving
from rlstitch.asking import PartError, ask
from rlstitch.config import compose
from rlstitch.contract import broken, contract
from rlstitch.data import read_prompts
from rlstitch.parts import Parts
from rlstitch.rewards import server, service
from rlstitch.rewards.http import HttpReward
from rlstitch.scoring import NoScore
from rlstitch.shapes.prompts import Prompt, scenes_for
from rlstitch.shapes.reward import DetectorReward
from rlstitch.shapes.scenes import render
from rlstitch.types import Batch, UserError
from tests.services import running
from tests.services import serving as scripted
from tests.test_jobs import train
from tests.test_train import rows, world  # noqa: F401  (a fixture)

HEALTH = {"contract": 1, "reward": "light"}


def batch_of(prompts, facts=()):
    index = torch.arange(len(prompts))
    return Batch(list(prompts), index, index, list(facts))


def light(path, body, turn):
    """A service that gives a picture the length of its PNG, which says which one it is."""
    return HEALTH if path == "/health" else {"contract": 1, "scores": [float(len(p["png"])) for p in body["pictures"]]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(service, "PAUSE", 0.005)


def test_a_reward_scores_through_http_as_it_does_here(generator):
    """Pictures as eight bits, prompts and rows whole, NaN as null and back; in requests of three, at once, in order."""
    prompts = read_prompts("shapes:held_out.jsonl")
    batch = batch_of(prompts.prompts[:8], prompts.rows[:8])
    images = torch.rand(8, 3, 64, 64, generator=generator).mul(255).round() / 255
    images[1] = 1.0

    class Half(DetectorReward):
        def score(self, images, batch):
            assert not torch.is_grad_enabled() and batch.prompts == [row["prompt"] for row in batch.facts]
            scores = super().score(images, batch) + images.mean((1, 2, 3))
            return torch.where(images.amin((1, 2, 3)) == 1, torch.nan, scores)

    local = Half(soft=True)
    with running(server.server_of(local, "half", port=0)) as url, torch.no_grad():
        reward = HttpReward(url, at_once=3)
        found = ask("half", reward, images + 0.001, batch)
        torch.testing.assert_close(found, local.score(images, batch), equal_nan=True, atol=1e-5, rtol=0)
        assert (
            math.isnan(found[1]) and (reward.service.asked, reward.service.failed) == (8, 1) and "no score of a picture" in reward.failure
        )
    with running(server.server_of(DetectorReward(soft=True), "detector", port=0)) as url:
        assert not broken(
            clauses := contract(
                "far",
                HttpReward(url),
                render(scenes_for([Prompt.from_json(row) for row in batch.facts[:3]], seed=0), 64),
                batch.prompts[:3],
                batch.facts[:3],
            )
        ), clauses
        with pytest.raises(
            PartError, match="reward 'far': http://127.*status 422: "
        ):  # refused by the reward itself, before anything was scored
            ask("far", HttpReward(url), images[:1], batch_of(["a star"], [{"prompt": "a star"}]))
    batch.facts[0]["day"] = datetime.date(2020, 1, 2)  # as parquet has them
    batch.facts[1]["share"] = math.nan
    with scripted(light) as asked:
        HttpReward(asked.url, at_once=8).score(images, batch)
        sent = asked.requests[-1][2]["pictures"]
    assert sent[0]["facts"]["day"] == "2020-01-02" and sent[1]["facts"]["share"] is None and sent[2]["prompt"] == prompts.prompts[2]


def drip(handler):
    """An answer that is always about to come."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"contract": 1, ')


def scores(*values):
    return {"contract": 1, "scores": list(values)}


ODD = {  # what a service says of two pictures: why they have no score, and how often it was asked
    "a web page, not": ((200, b" <!doctype html><html>Log in</html>", {}), 1),
    "its answer is no JSON: hello": ((200, b"hello", {}), 1),
    "is a JSON list": ([1.0, 2.0], 1),
    "its answer is no {'contract': 1, 'scores'": ({"rewards": [1.0, 2.0]}, 1),
    "is no {'contract'": ({"contract": 2, "scores": [1.0, 2.0]}, 1),
    "3 scores of 2 pictures": (scores(1.0, 2.0, 3.0), 1),
    "is '0.5', not a finite number": (scores("high", "0.5"), 1),
    "is 'True'": (scores([1.0], True), 1),
    "is 'nan'": (scores(-math.inf, math.nan), 1),
    "is '1000": (scores({}, 10**400), 1),
    "more than 4 MiB": ((200, b"[" * (5 << 20), {}), 1),
    "no JSON": ((200, b"[" * 200_000, {}), 1),
    "status 404: no such model": ((404, {"error": {"message": "no such model"}}, {}), 1),
    "status 500: a web page": ((500, b"<html>oops</html>", {}), 3),
    "status 429": ((429, {"detail": "slow down"}, {"Retry-After": "0.01"}), 3),
    "no answer within 0.3 s": (drip, 3),
    "broke off in the middle": (cut_off, 3),
    "Remote end closed": (lambda handler: handler.close_connection, 3),
    "redirects to another host": ((307, b"", {"Location": "http://localhost:1/score"}), 1),
    "redirects to another host, which pictures are not sent to: https": ((308, b"", {"Location": "https://127.0.0.1/score"}), 1),
    "name that as url": ((302, b"", {"Location": "/score/"}), 1),
    "in a circle": ((307, b"", {"Location": "/score"}), 4),
}


def test_whatever_a_service_answers_wrongly_is_no_score_and_told(capsys):
    images, batch = torch.rand(2, 3, 8, 8), batch_of(["a", "b"])
    with scripted(light) as asked:
        reward = HttpReward(asked.url, timeout=30, retries=2, concurrency=1)
        assert torch.isfinite(reward.score(images, batch)).all()
        for why, (answer, times) in ODD.items():
            asked.reply, asked.requests = (lambda path, body, turn: answer), []
            reward.service.timeout = 0.3 if answer is drip else 30
            assert reward.score(images, batch).isnan().all(), why
            assert why in reward.failure and len(reward.failure) < 400, (why, reward.failure)
            assert len(asked.requests) == times, (why, asked.paths())
        for answer in (
            (307, b"", {"Location": "/there/score?x=1"}),
            (503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
            cut_off,
            scores(1.0, None),
        ):
            asked.reply, asked.requests = (lambda path, body, turn: answer if turn == 1 else scores(1.0, 2.0)), []  # amiss once
            expected = [1.0, math.nan if isinstance(answer, dict) else 2.0]
            torch.testing.assert_close(reward.score(images, batch), torch.tensor(expected), equal_nan=True)
    assert reward.score(images, batch).isnan().all() and "refused" in reward.failure  # it is gone
    assert (reward.service.asked, reward.service.failed) == (2 * len(ODD) + 12, 2 * len(ODD) + 3)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and told[0].startswith("2 of 4 pictures without a score so far") and "46 of" not in told[-1]  # at 2, 4, 8, 16, 32


def test_a_service_that_is_not_right_from_the_start_ends_a_job_before_it_begins(monkeypatch):
    images, batch = torch.rand(2, 3, 8, 8), batch_of(["a", "b"])
    for health, why in (
        ((200, b"<html>", {}), "does not answer: it answers with a web page"),
        ({"contract": 2}, "keeps contract 2, and this is version 1"),
        ({}, "keeps contract None"),
        ((401, {"error": "who are you? you said Bearer k-123"}, {}), "status 401: who are you. you said Bearer [*][*][*]"),
    ):
        monkeypatch.setenv("OUR_KEY", "k-123")
        with scripted(lambda path, body, turn: health) as asked, pytest.raises(UserError, match=why) as error:
            HttpReward(asked.url + "/v1/", key_env="OUR_KEY", retries=0)
        assert (
            asked.requests[0][0] == "/v1/health"
            and asked.requests[0][1]["Authorization"] == "Bearer k-123"
            and "k-123" not in str(error.value)
        )
    with pytest.raises(UserError, match="refused. Start it first"):
        HttpReward(asked.url, retries=1)
    with scripted(lambda path, body, turn: HEALTH if path == "/health" else (500, b"", {})) as asked:
        with pytest.raises(PartError, match="reward 'light': http://127.0.0.1:.*status 500"):
            ask("light", HttpReward(asked.url, retries=0), images, batch)


def test_a_service_that_is_not_there_is_told_before_weights_load():
    far = {"_target_": "rlstitch.rewards.http.HttpReward", "url": "http://127.0.0.1:9", "retries": 0}
    with pytest.raises(UserError, match="127.0.0.1:9 does not answer: Connection refused"):
        Parts.of({"_target_": "rlstitch.backbones.Diffusers", "path": "nowhere"}, {"far": far})


def test_addresses_and_keys_are_looked_at_without_asking_anybody_and_secrets_are_never_shown(monkeypatch):
    monkeypatch.delenv("sk_secret", raising=False)
    monkeypatch.setenv("TWO", "a\nb")
    for options, why in (
        ({"url": "http://me:secret@127.0.0.1"}, "holds a name, a password or a query"),
        ({"url": "http://127.0.0.1/?key=secret"}, "holds a name, a password or a query"),
        ({"url": "127.0.0.1:80"}, "must be an address such as"),
        ({"url": "file:///etc/passwd"}, "must be an address such as"),
        ({"url": "http://127.0.0.1:99999"}, "is no address"),
        ({"url": "http://[::1"}, "is no address"),
        ({"url": "http://127.0.0.1/ä b"}, "must be plain letters"),
        ({"url": "http://a b/"}, "must be plain letters"),
        ({"url": "http://127.0.0.1", "key_env": "sk_secret"}, "names no environment variable that is set"),
        ({"url": "http://127.0.0.1", "key_env": "TWO"}, "holds more than a key"),
    ):
        ((key, told),) = HttpReward.faults(options)
        assert why in told and key in options and "secret" not in told
    assert not HttpReward.faults({"url": "https://judge.example.org:8443/a/b"}) + HttpReward.faults({"url": "http://[::1]:80"})


NFT = (
    "algorithm={_target_: rlstitch.algorithms.nft.NFT}", "oracle={_target_: rlstitch.oracles.Terminal, weights: {light: 1.0}}", "values={}",
    "stop={_target_: rlstitch.stops.End}", "batch.images_per_prompt=2", "evaluation.final=[raw]", "evaluation.max_prompts=2", "updates=3",
)  # fmt: skip


def test_a_service_that_goes_away_ends_a_run_with_a_checkpoint_and_one_line_and_it_goes_on(world):  # noqa: F811
    """First one picture of eight has no score, which is masked; then none has."""
    with scripted(light) as asked:
        node = f"{{_target_: rlstitch.rewards.http.HttpReward, url: '{asked.url}', at_once: 4, retries: 0}}"
        told = [*NFT, f"rewards.light={node}"]

        def failing(path, body, turn):
            answer = light(path, body, turn)
            if (
                path == "/score" and (scored := asked.paths().count("/score")) > 1
            ):  # the first are the blank pictures that it is asked about
                answer = (500, b"", {}) if scored > 3 else scores(*[None, *answer["scores"][1:]])
            return answer

        asked.reply, asked.requests = failing, []
        with pytest.raises(
            NoScore,
            match=r"update 2: light gave no score for any of 8 pictures \(NaN or infinite\); http://127.0.0.1:\d+: status 500; the weights are",
        ):
            train(world, "gone", *told)
        assert [f.name for f in (world / "runs" / "gone" / "checkpoints").iterdir()] == ["step-000001"]
        asked.reply = light
        with scripted(light) as elsewhere:  # it may have moved, and be asked otherwise
            train(world, "gone", *(t.replace(asked.url, elsewhere.url).replace("retries: 0", "retries: 1") for t in told))
    assert [row["step"] for row in rows(world, "gone") if "rewards" in row] == [1, 2, 3]


def test_a_recipe_s_reward_is_served_and_nothing_else_of_it_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text("class Red:\n    def score(self, images, batch):\n        return images[:, 0].mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = compose("nft") | {
        "rewards": {"red": {"_target_": "theirs.Red"}, "odd": {"_target_": "theirs.Blue"}},
        "reward": "red",
        "port": 0,
    }
    served = serving.Served(serving.checked(given, "nft"))
    with running(server.server_of(served, "red", port=0)) as url:
        found = HttpReward(url).score(images := torch.rand(2, 3, 8, 8), batch_of(["a", "b"]))
    torch.testing.assert_close(found, images[:, 0].mean((1, 2)), atol=3e-3, rtol=0)
    for change, why in (
        ({"reward": ""}, "'reward' must name the one to serve, of red, odd"),
        ({"reward": "rde"}, "did you mean 'red'"),
        ({"prot": 1}, "did you mean 'port'"),
    ):
        with pytest.raises(UserError, match=why):
            serving.checked(given | change, "nft")
    with (
        running(server.server_of(served, "red", port=0)) as url,
        pytest.raises(UserError, match=r"nothing can be served at 127.0.0.1, port \d+ \(Address already in use\)"),
    ):
        launcher.run(["recipe=reward/shapes", "reward=detector", f"port={url.rsplit(':', 1)[1]}"])
    launcher.run(["recipe=reward/shapes", "reward=detector", "check=true"])
    assert "would serve 'detector' (rlstitch.shapes.reward.DetectorReward) at http://127.0.0.1:8765" in capsys.readouterr().out


def test_the_server_runs_by_itself_in_an_old_python():
    """Its syntax is 3.8's, and it imports nothing of rlstitch; requests that are none are refused, one that has gone away harms nobody."""
    source = Path(server.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert not [name for name in names if name.startswith("rlstitch")]
    picture = {"png": service.png(torch.rand(3, 8, 8)), "prompt": "a"}
    for request, why in (
        ({}, "a request is"),
        ({"contract": 2, "pictures": [picture]}, "a request is"),
        ({"contract": 1, "pictures": []}, "at least one"),
        ({"contract": 1, "pictures": [picture, picture | {"png": service.png(torch.rand(3, 8, 9))}]}, "one size"),
        ({"contract": 1, "pictures": [picture, {"png": "x"}]}, "picture 1: "),
        ({"contract": 1, "pictures": [picture | {"prompt": 3}]}, "a text 'prompt'"),
    ):
        with pytest.raises(server.Refused, match=why):
            server.pictures_of(request)
    seen = threading.Event()

    class Slow:
        def score(self, images, batch):
            seen.wait(5)
            return torch.ones(len(images))

    with running(server.server_of(Slow(), "slow", port=0)) as url:
        hasty = HttpReward(url, retries=0)
        hasty.service.timeout = 0.1
        with pytest.raises(UserError, match="no answer within 0.1 s"):
            hasty.score(torch.rand(1, 3, 8, 8), batch_of(["a"]))
        seen.set()
        assert HttpReward(url).score(torch.rand(1, 3, 8, 8), batch_of(["a"])).tolist() == [1.0]
