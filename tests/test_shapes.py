"""The miniature world: renderer, prompts, facts and the detector, whose agreement with the truth is what makes it a judge."""

import random
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTokenizer

from rlstitch.files import resolve
from rlstitch.shapes import detector, prompts, tokenizer
from rlstitch.shapes.looks import balance, contrast, saturation
from rlstitch.shapes.prompts import (
    FactTable,
    Need,
    Prompt,
    PromptTable,
    draw_prompt,
    fractions,
    full_captions,
    make_splits,
    met,
    scenes_for,
)
from rlstitch.shapes.reward import DetectorReward
from rlstitch.shapes.scenes import RELATIONS, SHAPES, coverage, patch_labels, render, sample_scenes
from rlstitch.types import Batch, UserError


@pytest.fixture(scope="module")
def world():
    scenes = sample_scenes(400, torch.Generator().manual_seed(5))
    return scenes, render(scenes)


def test_rendering_is_deterministic_in_range_and_without_overlap(world):
    scenes, images = world
    assert images.shape == (400, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, render(sample_scenes(400, torch.Generator().manual_seed(5))))
    gap = (scenes.centre[:, :, None] - scenes.centre[:, None]).norm(dim=-1) - scenes.radius[:, :, None] - scenes.radius[:, None]
    both = (scenes.shape >= 0)[:, :, None] & (scenes.shape >= 0)[:, None] & ~torch.eye(4, dtype=torch.bool)
    assert gap[both].min() > 2


def test_areas_are_those_of_the_shapes():
    """Anti-aliased coverage integrates to the exact area of circle, square, ring and cross."""
    r = 12.0
    exact = {
        "circle": torch.pi * r**2,
        "square": (2 * 0.84 * r) ** 2,
        "ring": torch.pi * r**2 * (1 - 0.52**2),
        "cross": 4 * 0.34 * 2 * r * r - (2 * 0.34 * r) ** 2,
    }
    for name, area in exact.items():
        mask = coverage(torch.tensor([SHAPES.index(name)]), torch.tensor([[31.7, 32.2]]), torch.tensor([r]), torch.tensor([0.0]))
        assert mask.sum().item() == pytest.approx(area, rel=0.01)


def test_detector_agrees_with_the_truth(world):
    scenes, images = world
    truth, seen = FactTable.from_scenes(scenes), detector.detect(images).facts()
    assert (truth.counts == seen.counts).flatten(1).all(1).float().mean() >= 0.98
    assert (truth.relations == seen.relations).flatten(1).all(1).float().mean() >= 0.97
    assert torch.equal(truth.dark, seen.dark)


def test_detector_judges_prompts(world):
    rng = random.Random(0)
    asked = [draw_prompt(rng) for _ in range(300)]
    images = render(scenes_for(asked, 1))
    assert detector.correct(images, asked).float().mean() >= 0.98
    assert detector.correct(images, asked[1:] + asked[:1]).float().mean() < 0.2
    scores = detector.summary(detector.correct(images, asked), asked)
    assert set(scores) == {*prompts.KINDS, "overall"} and scores["overall"] == pytest.approx(sum(scores[k] for k in prompts.KINDS) / 6)


def test_detector_sees_nothing_in_noise_or_on_an_empty_picture():
    assert (detector.detect(torch.full((2, 3, 64, 64), 0.9)).area == 0).all()
    noise = detector.detect(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (noise.shape >= 0).sum() == 0
    with pytest.raises(ValueError, match="resize"):
        detector.detect(torch.zeros(1, 3, 32, 32))


def test_facts_by_hand():
    """Two red circles left of a blue star."""
    facts = FactTable.from_objects(
        torch.tensor([[0, 0, 3]]), torch.tensor([[0, 0, 4]]), torch.tensor([[[10.0, 10], [12, 50], [50, 30]]]), torch.tensor([True])
    )
    assert facts.counts[0, 0, 0] == 2 and facts.counts[0, -1, -1] == 3 and facts.counts[0, 3, -1] == 1

    def share(*needs, relation=None):
        return fractions(facts, PromptTable.from_prompts([Prompt("", "x", needs, relation)])).item()

    assert share(Need("circle", "red", 2, True)) == 1 and share(Need("circle", None, 1, True)) == 0 and share(Need("circle")) == 1
    assert share(Need("circle"), Need("star"), relation="left of") == 1
    assert share(Need("circle"), Need("star"), relation="right of") == pytest.approx(2 / 3)
    assert share(Need("circle", "red"), Need("star", "green")) == 0.5


def test_full_captions_hold_of_their_own_scene_only(world):
    scenes, _ = world
    captions = full_captions(scenes, random.Random(0))
    cross = met(FactTable.from_scenes(scenes), PromptTable.from_prompts(captions), paired=False)
    assert cross.diagonal().all() and cross.float().sum(1).mean() < 1.6


def test_splits_are_fixed_disjoint_and_shipped_as_they_are_made():
    splits = make_splits()
    train, held = ({p.text for p in splits[n]} for n in ("train", "held_out"))
    assert len(train) >= 512 and len(held) >= 256 and not train & held
    facts = [{(p.needs, p.relation) for p in splits[n] if p.kind in ("position", "color_attr")} for n in ("train", "held_out")]
    assert not facts[0] & facts[1]
    assert {p.kind for p in splits["held_out"]} == set(prompts.KINDS)
    assert [Prompt.from_json(p.to_json()) for p in splits["train"]] == splits["train"]


def test_tokenizer_knows_the_world_in_single_tokens_and_ends_with_another_id_than_2(tmp_path):
    built = tokenizer.build(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a picture of two red crosses, an orange star and three rings on a dark background"
    ids = loaded(text).input_ids
    assert len(ids) == 2 + len(text.replace(",", " ,").split()) and ids[-1] == loaded.eos_token_id == len(built) - 1 != 2
    longest = max((p.text for p in full_captions(sample_scenes(300, torch.Generator().manual_seed(0)), random.Random(0))), key=len)
    assert len(loaded(longest).input_ids) <= tokenizer.MAX_LENGTH


def test_patch_labels_follow_the_objects(world):
    scenes, _ = world
    shape, colour = patch_labels(scenes)
    assert ((shape > 0) == (colour > 0)).all()
    for i in range(20):
        x, y = scenes.centre[i, 0].tolist()
        if SHAPES[scenes.shape[i, 0]] != "ring":
            assert shape[i, int(y // 8) * 8 + int(x // 8)] == scenes.shape[i, 0] + 1


def test_looks_fall_when_pictures_are_washed_out(world):
    _, images = world
    grey = images.mean(1, keepdim=True).expand_as(images)
    dull = 0.5 * images + 0.5 * grey
    assert (saturation(dull) < saturation(images)).all()
    assert (contrast(0.3 * images + 0.35) < contrast(images)).all()
    centred = torch.zeros(1, 3, 64, 64)
    centred[:, 0, 28:36, 28:36] = 1
    assert balance(centred).item() == pytest.approx(1.0, abs=0.02) and balance(centred.roll(20, -1)).item() < 0.5


def test_detector_reward_needs_facts_of_this_world():
    good = Prompt("a circle left of a star", "position", (Need("circle"), Need("star", "red", 2)), RELATIONS[0]).to_json()
    assert DetectorReward.unreadable([good]) == ""
    one = {"shape": "circle", "colour": None, "count": 1, "exact": False}
    for change, message in (
        ({"objects": None}, "'objects' of 'a circle left of a star' must list 1 to 4 objects, not None"),
        ({"objects": "x"}, "must list 1 to 4 objects, not 'x'"),
        ({"objects": []}, "not []"),
        ({"objects": [5]}, "not [5]"),
        ({"objects": [one] * 5}, "must list 1 to 4"),
        ({"objects": [{"shape": "circle"}]}, "'colour' of"),
        ({"objects": [one | {"shape": "sphere"}]}, "'shape' of 'a circle left of a star' must be one of"),
        ({"objects": [one | {"count": "2"}]}, "not '2'"),
        ({"objects": [one | {"count": 10**30}]}, "'count' of"),
        ({"objects": [one | {"exact": "no"}]}, "'exact' of"),
        ({"kind": 5}, "'kind' of 'a circle left of a star' must be one of single_object"),
        ({"kind": ["position"]}, "'kind' of"),
        ({"relation": "near"}, "'relation' of"),
        ({"objects": [one]}, "takes two objects"),
    ):
        row = good | change
        assert message in DetectorReward.unreadable([good, row]), change
        with pytest.raises(UserError):
            DetectorReward().score(torch.zeros(1, 3, 64, 64), Batch([row["prompt"]], torch.zeros(1), torch.zeros(1), [row]))


def test_the_flux_miniature_is_trained_as_it_is_run(tmp_path, monkeypatch):
    """The call of its training, under any guidance, is the backbone's on the pipeline that was saved."""
    from rlstitch.backbones import Diffusers
    from rlstitch.shapes import tokenizer
    from rlstitch.shapes.pretrain import flux

    monkeypatch.setattr(flux, "autocast", nullcontext)
    torch.manual_seed(0)
    words = tokenizer.build(tmp_path / "words")
    model = torch.nn.ModuleDict({"transformer": flux.build_transformer(), **flux.text_encoders(words)}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if not p.any() else None  # what begins at zero tells nothing
    vae = AutoencoderKL.from_pretrained(resolve("shapes:shapes") / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(**flux.SCHEDULER)
    FluxPipeline(**model, vae=vae, tokenizer=words, tokenizer_2=words, scheduler=scheduler).save_pretrained(tmp_path / "flux")
    z, sigma = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.9])
    prompts = ["a red circle", "two blue stars"]
    ids = words(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        for w in (1.0, 3.5):
            backbone = Diffusers(str(tmp_path / "flux"), image_size=64, max_sequence_length=24, embedded_guidance=w)
            found = flux.velocity(model, z, sigma, flux.said(model, ids), torch.full((2,), w))
            wanted = backbone.velocity(z, sigma, backbone.encode_prompts(prompts))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (
        sum(f.stat().st_size for part in ("transformer", "text_encoder", "text_encoder_2") for f in (tmp_path / "flux" / part).iterdir())
        < 2 * 5e6
    )


def test_the_flux_miniature_draws_what_it_is_told_and_more_so_under_guidance():
    """As shipped, in eight steps on 16 prompts: clip .50 at embedded guidance 1 and .67 at 5."""
    from rlstitch import config as cfg
    from rlstitch import sampling, schedule, scheduler
    from rlstitch.backbones import Diffusers
    from rlstitch.data import encode
    from rlstitch.prompts import PromptSet, read_prompts
    from rlstitch.types import noise_like

    weights = resolve("shapes:shapes-flux")
    assert sum(f.stat().st_size for f in weights.rglob("*") if f.is_file() and "vae" not in f.parts) < 5e6
    assert sum(f.stat().st_size for f in weights.parent.rglob("*") if f.is_file()) < 34e6
    reward = cfg.build(cfg.compose("reward/shapes")["rewards"]["clip"], kind="reward", device="cpu")
    rows = read_prompts("shapes:held_out.jsonl").rows[::21][:16]
    found = []
    for told in (1.0, 5.0):
        backbone = Diffusers("shapes:shapes-flux", image_size=64, max_sequence_length=24, embedded_guidance=told)
        prompts = encode(backbone, PromptSet([r["prompt"] for r in rows], rows))[0]
        batch = prompts.batch(list(range(16)), torch.arange(16))
        grid = schedule.sigmas(8, scheduler.resolve("shift", "auto", backbone), "plain")
        with torch.no_grad():
            z = sampling.sample(backbone.bind(batch.text), noise_like(backbone.latent_shape, batch.seeds), grid).z
            found.append(float(reward.score(backbone.decode(z), batch).mean()))
    assert 0.42 < found[0] < found[1] - 0.08, found


def test_pretraining_resumes_bit_for_bit_from_tensors_alone(tmp_path):
    from rlstitch.shapes.pretrain.common import fit

    class Killed(Exception):
        pass

    def trained(folder, last=99):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def loss_of(step, generator):
            if step > last:
                raise Killed
            loss = model(torch.randn(4, 3, generator=generator)).square().mean()
            return loss, {"loss": loss}

        fit("line", model, loss_of, steps=8, lr=0.1, seed=0, work=folder, log_every=0.5)
        return model

    whole = trained(tmp_path / "one")
    with pytest.raises(Killed):
        trained(tmp_path / "two", last=6)
    assert [f.suffix for f in (tmp_path / "two").iterdir()] == [".safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), trained(tmp_path / "two").parameters()))
