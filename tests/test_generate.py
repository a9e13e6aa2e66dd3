"""The model's own pictures: made row by row as told, kept by all that made them, and used by a stitch that starts with an empty cache."""

import dataclasses
import json

import pytest
import torch

from rlstitch import sampling, schedule
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.data import PromptSet, encode
from rlstitch.files import cache_folder
from rlstitch.filling import fill
from rlstitch.stitch import generate as module
from rlstitch.stitch import recipe as stitch
from rlstitch.stitch.generate import GenerateConfig, faults, generate
from rlstitch.types import noise_like
from tests.test_stitch_job import folder, given  # noqa: F401  (a fixture)

PROMPTS = ["a red circle", "two blue stars", "a green square"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((cache_folder() / "generations").glob("*"))


def prompts_of(backbone):
    return encode(backbone, PromptSet(PROMPTS, [{"prompt": p} for p in PROMPTS]))[0]


def test_every_row_is_its_own_prompt_guidance_and_seed(backbone, cache):
    config = GenerateConfig(count=7, guidance=[1.0, 2.0], num_steps=3, batch_size=2, precision="fp32", seed=3)
    latents, index, seconds = generate(backbone, prompts_of(backbone), config, "t")
    assert index == [0, 1, 2, 0, 1, 2, 0] and len(latents) == 7 and seconds > 0
    for k, guidance in ((0, 1.0), (3, 2.0), (4, 1.0), (6, 2.0)):
        z = noise_like(backbone.latent_shape, torch.tensor([k + 3 * 1_000_003]))
        text = backbone.encode_prompts([PROMPTS[index[k]]])
        alone = sampling.sample(backbone.bind(text, guidance), z, schedule.sigmas(3, 3.0, "plain")).z
        torch.testing.assert_close(latents[k : k + 1], alone, atol=1e-4, rtol=1e-3)


def test_they_are_kept_by_all_that_made_them(backbone, sd3_dir, cache, monkeypatch):
    config = GenerateConfig(count=2, guidance=[1.0], num_steps=2, precision="fp32")
    first, _, seconds = generate(backbone, prompts_of(backbone), config, "t")
    sample = sampling.sample
    monkeypatch.setattr(module.sampling, "sample", lambda *a, **k: pytest.fail("made again"))
    again, _, told = generate(backbone, prompts_of(backbone), config, "t")
    assert torch.equal(first, again) and told == pytest.approx(seconds) and len(cache()) == 1
    monkeypatch.setattr(module.sampling, "sample", sample)
    others = [
        dataclasses.replace(config, **{k: v})
        for k, v in (("guidance", [2.0]), ("num_steps", 3), ("shift", 1.0), ("seed", 1), ("precision", "bf16"))
    ]
    for n, other in enumerate(others, 2):
        generate(backbone, prompts_of(backbone), other, "t")
        assert len(cache()) == n
    large = SD3Backbone(str(sd3_dir), max_sequence_length=0, image_size=2 * backbone.size[0])
    assert generate(large, prompts_of(large), config, "t")[0].shape[-1] == 2 * first.shape[-1] and len(cache()) == 7
    with torch.no_grad():  # another denoiser in the same folder, e.g. with a LoRA merged in
        from safetensors.torch import load_file, save_file

        file = next((sd3_dir / "transformer").glob("*.safetensors"))
        tensors, before = load_file(file), file.read_bytes()
        save_file({k: v + 1e-3 * (k == list(tensors)[len(tensors) // 2]) for k, v in tensors.items()}, file)
    try:
        generate(backbone, prompts_of(backbone), config, "t")
    finally:
        file.write_bytes(before)
    assert len(cache()) == 8


def test_a_cache_that_cannot_be_written_or_read_costs_nothing_but_time(backbone, cache, monkeypatch, capsys):
    config = GenerateConfig(count=2, guidance=[1.0], num_steps=2, precision="fp32")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", full)
        first = generate(backbone, prompts_of(backbone), config, "pictures")[0]
    assert "cannot be kept" in capsys.readouterr().out and not cache()
    generate(backbone, prompts_of(backbone), config, "t")
    cache()[0].write_bytes(b"damaged")
    assert torch.equal(generate(backbone, prompts_of(backbone), config, "t")[0], first)
    assert "made anew" in capsys.readouterr().out


def test_a_stitch_with_an_empty_cache_under_guidance_in_bf16(folder, sd3_dir, clip_dir, cache):  # noqa: F811
    """The null text is first asked for in the midst of a bf16 rollout; the search after it runs in float32."""
    text = folder / "prompts.txt"
    text.write_text("\n".join(PROMPTS))
    own = {"count": 6, "guidance": [1.0, 3.0], "num_steps": 2, "batch_size": 3, "precision": "bf16", "prompts": str(text)}
    stitch.run(stitch.checked(given(folder, sd3_dir, clip_dir, generate=own), "tiny"))
    card = json.loads((folder / "values" / "tiny" / "value.json").read_text())
    assert card["generate"]["precision"] == "bf16" and card["generate_seconds"] > 0 and len(cache()) == 1


def test_faults_of_the_node():
    config, told = fill(GenerateConfig, {"count": 4, "prompts": "none.txt", "num_steps": 0, "guidance": [], "precision": "fp8"})
    told = " ".join(told + faults("generate", config))
    assert all(
        part in told for part in ("'generate.prompts'", "'num_steps' must be positive", "'guidance' must not be empty", "auto, fp32, bf16")
    )
    assert "'count' must not be negative" in fill(GenerateConfig, {"count": -1})[1][0]
