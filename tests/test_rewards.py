"""The CLIP family's scores in reduced precision: what must not be rounded is not."""

import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from rlstitch.metrics import to_image
from rlstitch.rewards.clip import ClipReward
from rlstitch.rewards.simple import Darkness, JpegSize, Sharpness
from rlstitch.types import Batch, UserError

BATCH = Batch(["a red circle", "two stars"], torch.arange(2), torch.arange(2))


def test_the_logit_scale_is_read_before_the_cast(clip_dir):
    """PickScore's 4.6052 is 4.59375 in bfloat16, and 100 would be 99."""
    full, half = (ClipReward(str(clip_dir), scale="logit", dtype=d) for d in ("float32", "bfloat16"))
    assert half.scale == full.scale == pytest.approx(math.exp(float(full.model.logit_scale)))
    assert half.model.visual_projection.weight.dtype == torch.bfloat16


def test_the_score_is_the_models_cosine(clip_dir, generator):
    """Transformers' own forward on the pictures as prepared; then scaled and shifted, as a surrogate's file asks."""
    reward, images = ClipReward(str(clip_dir)), torch.rand(2, 3, 16, 16, generator=generator)
    model = CLIPModel.from_pretrained(clip_dir).eval()
    ids = reward.tokenizer(BATCH.prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        seen = model(input_ids=ids, pixel_values=reward.preprocessing(images))
    cosine = seen.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(reward.score(images, BATCH), cosine.detach(), atol=1e-5, rtol=1e-4)
    reward.scale, reward.offset = 3.0, 0.5
    torch.testing.assert_close(reward.score(images, BATCH), 3 * cosine.detach() + 0.5, atol=1e-5, rtol=1e-4)


def test_a_model_hashes_alike_in_either_precision(clip_dir):
    assert ClipReward(str(clip_dir)).fingerprint() == ClipReward(str(clip_dir), dtype="bfloat16").fingerprint()


def test_a_head_is_not_rounded_inside_autocast(clip_dir, tmp_path):
    (tmp_path / "head.pth").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle that torch.load does not read with weights_only=True"):
        ClipReward(str(clip_dir), head=str(tmp_path / "head.pth"))
    width = ClipReward(str(clip_dir)).model.config.projection_dim
    head = {"0.weight": torch.randn(1, width, generator=torch.Generator().manual_seed(0)), "0.bias": torch.tensor([6.0])}
    save_file(head, tmp_path / "head.safetensors")
    reward = ClipReward(str(clip_dir), head=str(tmp_path / "head.safetensors"))
    embedding = torch.nn.functional.normalize(torch.randn(2, width), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reward.score_embedding(embedding, BATCH)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, embedding @ head["0.weight"][0] + 6.0)


def test_darkness_by_hand():
    grey, red = torch.full((3, 4, 4), 0.25), torch.zeros(3, 4, 4)
    red[0] = 1.0
    torch.testing.assert_close(Darkness().score(torch.stack([grey, red]), BATCH), torch.tensor([0.75, 2 / 3]))


def test_embeddings_of_texts_are_kept_up_to_a_number(reward, monkeypatch):
    monkeypatch.setattr("rlstitch.rewards.clip.TEXTS_KEPT", 2)
    first = reward.embed_texts(["a", "b", "c"])
    assert list(reward._texts) == ["b", "c"]
    assert torch.equal(reward.embed_texts(["b", "a", "b"]), first[[1, 0, 1]]) and list(reward._texts) == ["b", "a"]


def test_jpeg_size_and_sharpness_by_hand(generator, tmp_path):
    """The size of the file that Pillow writes; the variance of the Laplacian by shifted differences, with its gradient."""
    images = torch.stack([torch.rand(3, 12, 10, generator=generator), torch.full((3, 12, 10), 0.4)])
    to_image(images[0]).save(tmp_path / "one.jpg", quality=95)
    size, more = JpegSize().score(images, BATCH), JpegSize(larger=True).score(images, BATCH)
    assert size[0] == pytest.approx(-(tmp_path / "one.jpg").stat().st_size / 1000) and size[1] > size[0] and torch.equal(more, -size)
    grey = 255 * (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]).double()
    inner = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * grey[:, 1:-1, 1:-1]
    torch.testing.assert_close(Sharpness().score(images, BATCH).double(), inner.flatten(1).var(1, correction=0), rtol=1e-4, atol=1e-4)
    leaf, step = images[:1].clone().requires_grad_(True), torch.zeros(1, 3, 12, 10)
    (slope,) = torch.autograd.grad(Sharpness().score(leaf, BATCH[:1]).sum(), leaf)
    step[0, 1, 5, 5] = 1e-2
    up, down = (Sharpness().score(images[:1] + sign * step, BATCH[:1]) for sign in (1, -1))
    assert float((up - down) / 2e-2) == pytest.approx(float(slope[0, 1, 5, 5]), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_in_half_precision_are_scored_as_what_they_are(reward, generator, dtype):
    images = torch.rand(2, 3, 20, 24, generator=generator).to(dtype)
    batch = Batch(["two red stars", "a blue ring"], torch.arange(2), torch.arange(2))
    for one in (reward, Sharpness(), Darkness()):
        torch.testing.assert_close(one.score(images, batch).float(), one.score(images.float(), batch), atol=2e-3, rtol=1e-3)
