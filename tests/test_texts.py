"""Text encoders: loaded once for all that is asked, never beside the denoiser on an accelerator, and left out where a recipe says so."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rlstitch import config as cfg
from rlstitch.backbones import Diffusers, texts
from rlstitch.checks import checked
from rlstitch.part_checks import model_faults
from rlstitch.trainer import Trainer
from rlstitch.types import UserError
from tests.conftest import write_sd3
from tests.pipelines import WRITERS

PROMPTS = ["a red circle", "two stars"]


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("t5"), t5=True)


def test_a_model_may_go_without_t5(t5_dir, tmp_path):
    """As the stock pipeline does without it, whether its files are there or not; what is cached of one is not taken for the other's."""
    folder, cache = shutil.copytree(t5_dir, tmp_path / "model"), str(tmp_path / "cache")
    with_t5 = Diffusers(str(folder), max_sequence_length=6, cache=cache).encode_prompts(PROMPTS)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    backbone = Diffusers(str(folder), max_sequence_length=6, text_encoder_3="none", cache=cache)
    text = backbone.encode_prompts(PROMPTS)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=6)
    torch.testing.assert_close((text.tokens, text.pooled), (tokens, pooled), atol=1e-5, rtol=1e-5)
    assert text.tokens.shape == with_t5.tokens.shape and not text.tokens[:, -6:].any() and with_t5.tokens[:, -6:].any()
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(folder)}
    assert model_faults(node | {"text_encoder_3": "none"}) == []
    assert "model.text_encoder_3=none" in model_faults(node)[0]
    long = ["a red circle " * 3]
    assert [limit for *_, limit in backbone.too_long(long)] == []  # CLIP's 77, not the six tokens of T5
    assert [limit for *_, limit in Diffusers(str(t5_dir), max_sequence_length=6).too_long(long)] == [6]


def test_no_other_encoder_can_be_left_out(tmp_path):
    WRITERS["flux"](tmp_path)
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": str(tmp_path), "text_encoder_3": "none"}
    (told,) = model_faults(node)
    assert told == "'model.text_encoder_3': FluxPipeline has no text without its text_encoder_3: leave the key out"
    with pytest.raises(UserError, match="FluxPipeline has no text without its text_encoder_3"):
        Diffusers(str(tmp_path), text_encoder_3="none")


def test_encoders_are_loaded_once_for_prompts_and_guidances_other_branch(t5_dir, tmp_path, monkeypatch):
    loads, load = [], texts.Texts.pipeline
    monkeypatch.setattr(texts.Texts, "pipeline", lambda self: loads.append(1) or load(self))
    for cache in (None, str(tmp_path)):
        loads.clear()
        backbone = Diffusers(str(t5_dir), max_sequence_length=4, cache=cache)
        backbone.encode_prompts(PROMPTS) if cache is None else backbone.remember(PROMPTS)
        null = backbone.null
        assert len(loads) == 1
        loads.clear()
        alone = Diffusers(str(t5_dir), max_sequence_length=4).encode_prompts([""])
        assert torch.equal(null.tokens, alone.tokens)


def test_a_first_guided_start_loads_them_once(tmp_path, monkeypatch):
    """For the prompts, those of the evaluation, and the empty one, which value models and guidance ask for; with a cache and without."""
    loads, load = [], texts.Texts.pipeline
    monkeypatch.setattr(texts.Texts, "pipeline", lambda self: loads.append(1) or load(self))
    for name, rows in (("train", PROMPTS), ("held", ["three rings", *PROMPTS])):
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    given = cfg.merge(
        cfg.compose("draft_stitch"),
        {
            "out": str(tmp_path / "run"), "updates": 1, "batch": {"prompts_per_update": 2}, "sampler": {"guidance": 4.5}, "logging": {"wandb": "off"},
            "data": {"prompts": str(tmp_path / "train.txt")}, "evaluation": {"prompts": str(tmp_path / "held.txt"), "rewards": ["clip"]},
        },
    )  # fmt: skip
    for cache in (None, str(tmp_path / "cache")):
        loads.clear()
        trainer = Trainer(checked(cfg.merge(given, {"model": {"cache": cache}}), "draft_stitch"))
        rollout = trainer.algorithm.rollout(next(iter(trainer.stages[0].stream.batches(0, 0))), 6)
        assert trainer.algorithm.score(rollout).isfinite().all() and len(trainer.held_out.batch([0], torch.tensor([1])).text) == 1
        assert len(loads) == 1


@pytest.mark.parametrize("trains", [False, True])
def test_the_denoiser_leaves_an_accelerator_to_the_encoders(t5_dir, monkeypatch, trains):
    """It comes back, also where they fail; one that trains stays, since its optimiser holds parts of it."""
    backbone, said = Diffusers(str(t5_dir), max_sequence_length=4), []
    stand_in = SimpleNamespace(
        device=torch.device("xpu"), config=backbone.transformer.config, to=lambda device: said.append(str(device)),
        parameters=lambda: [torch.zeros(1, requires_grad=trains)],
    )  # fmt: skip
    backbone.texts.transformer, encode = stand_in, backbone.arch.text
    monkeypatch.setattr(backbone.arch, "text", lambda *args: said.append("text") or encode(*args))
    backbone.encode_prompts(PROMPTS)
    assert said == (["text", "text"] if trains else ["cpu", "text", "text", "xpu"])
    monkeypatch.setattr(backbone.arch, "text", lambda *args: [][0])
    with pytest.raises(IndexError):
        backbone.encode_prompts(["a blue ring"])
    assert trains or said[-1] == "xpu"
