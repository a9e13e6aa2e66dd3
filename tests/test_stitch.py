"""Search, stitch and distillation of the stitched value model, each against something that is known exactly."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rlstitch import schedule
from rlstitch.backbones.sd3 import SD3Backbone
from rlstitch.rewards.clip import ClipReward
from rlstitch.rewards.preprocessing import stated
from rlstitch.stitch import distill as distilling
from rlstitch.stitch.distill import DistillConfig, distill, draw_sigma
from rlstitch.stitch.layer import StitchLayer, resample
from rlstitch.stitch.model import StitchedValueModel, values
from rlstitch.stitch.search import features, search, solve
from rlstitch.types import Batch, Latent, UserError

IMAGES = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def batch_of(prompts):
    return Batch(prompts, torch.arange(len(prompts)), torch.arange(len(prompts)))


def stitched(backbone, reward, *, i=2, j=1, normalise=False, sigma_range=(0.0, 1.0)):
    from rlstitch.fingerprints import vae_fingerprint

    result = search(backbone, reward, IMAGES, max_reward_block=2)
    pair = next(p for p in result.table if (p.i, p.j) == (i, j))
    card = {
        "backbone": {"_target_": "rlstitch.backbones.sd3.SD3Backbone", "path": str(backbone.path), "max_sequence_length": 0},
        "reward": {"_target_": "rlstitch.rewards.clip.ClipReward", "path": reward.path},
        "vae_sha256": vae_fingerprint(backbone.path),
        "blocks": i,
        "reward_block": j,
    }
    return (
        StitchedValueModel.from_search(
            backbone,
            reward,
            i,
            j,
            pair.weight,
            pair.bias,
            cls_state=result.cls[j],
            norm=2.0,
            normalise=normalise,
            sigma_range=sigma_range,
            card=card,
        ),
        pair,
        result,
    )


def test_search_equals_naive_least_squares_for_every_pair(backbone, reward):
    """The streamed Gram matrices give what float64 lstsq gives pair by pair, to 1e-8."""
    result = search(backbone, reward, IMAGES, max_reward_block=3, batch_size=7, seed=4)
    g = torch.Generator().manual_seed(4)
    draws = [(torch.rand(n, generator=g), torch.randn(n, *backbone.latent_shape, generator=g)) for n in (7, 7, 7, 7, 2)]
    parts = [features(backbone, reward, IMAGES[7 * k : 7 * k + 7], 3, *drawn) for k, drawn in enumerate(draws)]
    assert len(result.table) == backbone.num_blocks * 3
    for pair in result.table:
        f = torch.cat([p[0][pair.i - 1] for p in parts])
        t = torch.cat([p[1][pair.j - 1] for p in parts])
        design = torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1)
        w = torch.linalg.lstsq(design, t, driver="gelsd").solution
        loss = (design @ w - t).square().sum(1).mean()
        variance = (t - t.mean(0)).square().sum(1).mean()
        assert pair.loss == pytest.approx(loss.item(), abs=1e-8)
        assert pair.normalised == pytest.approx((loss / variance).item(), abs=1e-8)
        torch.testing.assert_close(f @ pair.weight.T + pair.bias, design @ w, atol=1e-7, rtol=0)


def test_solve_handles_a_singular_gram_matrix(generator):
    f = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    f = torch.cat([f, f[:, :1] + f[:, 1:2]], 1)
    target = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(f, target, driver="gelsd").solution
    torch.testing.assert_close(f @ solve(f.T @ f, f.T @ target), f @ best, atol=1e-8, rtol=0)


def test_choices(backbone, reward):
    result = search(backbone, reward, IMAGES, max_reward_block=2)
    assert result.best.normalised == min(p.normalised for p in result.table)
    assert result.cheapest(margin=1e9, max_fraction=1.0).i == 1
    assert result.cheapest(margin=0.0, max_fraction=0.4).i == 1
    with pytest.raises(ValueError, match="max_reward_block"):
        search(backbone, reward, IMAGES, max_reward_block=9)


def test_stitch_at_initialisation_is_the_linear_map(generator):
    weight, bias = torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator)
    grid = torch.randn(2, 5, 4, 4, generator=generator)
    expected = torch.einsum("oc,bchw->bohw", weight, grid) + bias[:, None, None]
    torch.testing.assert_close(StitchLayer(weight, bias, 4)(grid), expected.flatten(2).transpose(1, 2))
    wide = F.interpolate(expected, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(StitchLayer(weight, bias, 8)(grid), wide.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("resize", ["shortest_crop", "squash", "longest_pad"])
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (40, 64), (16, 16)])
def test_a_map_is_seen_as_the_reward_sees_the_picture(resize, size):
    """Of smooth pictures, so that what they are resampled by does not matter: every patch's mean is that of the picture as the tower gets it."""
    see = stated(resize, 16)
    y, x = (torch.linspace(0, 3, n) for n in size)
    picture = (0.5 + 0.25 * torch.sin(y)[:, None] + 0.2 * torch.cos(x)).expand(1, 3, *size)
    told = F.avg_pool2d(see(picture), 4)
    found = resample(F.avg_pool2d(picture, 4), 4, see.view(*size))
    inside = see(torch.ones(1, 3, *size)).amin(1, keepdim=True)  # not what is padded with black
    inside = -F.max_pool2d(-inside, 4) > 0.999
    torch.testing.assert_close(found[inside.expand_as(found)], told[inside.expand_as(told)], atol=0.02, rtol=0)
    assert inside.any()


def test_exact_linear_features_reproduce_the_clean_reward(reward):
    """j = 1 with a prefix whose features are an invertible linear map of the patch embedding: the stitched score is the reward's."""
    tokens = reward.patches(IMAGES)
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    stitch = StitchLayer(torch.linalg.inv(mix), torch.zeros(16), reward.grid)
    grid = (tokens @ mix.T).transpose(1, 2).reshape(30, 16, 4, 4)
    embedding, out = reward.tail(1)(stitch(grid))
    torch.testing.assert_close(F.normalize(embedding, dim=-1), F.normalize(reward.encode(IMAGES)[0], dim=-1), atol=2e-4, rtol=0)
    torch.testing.assert_close(out, reward.encode(IMAGES)[1], atol=2e-3, rtol=1e-3)


def test_prefix_and_suffix_of_the_reward_make_the_whole(reward):
    whole = F.normalize(reward.encode(IMAGES)[0], dim=-1)
    inputs = reward.inputs_of_block(IMAGES, 3)
    torch.testing.assert_close(reward.suffix(reward.prefix(IMAGES, 1), 1), whole)
    for j in (2, 3):
        torch.testing.assert_close(reward.suffix(reward.prefix(IMAGES, j), j, cls=inputs[j - 1][:, 0]), whole, atol=1e-5, rtol=1e-5)


def test_minimiser_of_the_distillation_is_the_conditional_mean():
    """Two pictures, one latent that cannot tell them apart: the un-normalised student learns the mean of their embeddings, 3:1 as they occur."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    targets = torch.stack([a, a, a, b])

    class Student(nn.Module):
        def __init__(self, normalise):
            super().__init__()
            self.free, self.normalise = nn.Parameter(torch.tensor([0.3, 0.9])), normalise
            self.reward = SimpleNamespace(head=None)

        def embed(self, grid):
            e = self.free.expand(len(grid), 2)
            return (F.normalize(e, dim=-1) if self.normalise else e), torch.zeros(len(grid), 1, 1)

    for normalise, expected in ((False, torch.tensor([0.75, 0.25])), (True, F.normalize(torch.tensor([0.75, 0.25]), dim=0))):
        student = Student(normalise)
        optimiser = torch.optim.SGD(student.parameters(), lr=0.2)
        for _ in range(400):
            loss, _ = distilling.distillation_loss(
                student, torch.zeros(4, 1), torch.ones(4), targets, torch.zeros(4, 1, 1), DistillConfig()
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found = student.embed(torch.zeros(1, 1))[0][0].detach()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_distillation_lowers_the_loss_and_touches_stitch_and_tail_only(backbone, reward):
    model, _, _ = stitched(backbone, reward)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    reward_before = reward.fingerprint()
    targets, tokens, _ = distilling.targets_of(reward, IMAGES)
    latents, losses = distilling.latents_of(backbone, IMAGES), []
    distill(
        model,
        latents,
        targets,
        tokens,
        DistillConfig(steps=60, batch_size=16, lr=2e-3, warmup=5, autocast=False),
        progress=lambda _, m: losses.append(m["loss"]),
    )
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"stitch", "tail"} and reward.fingerprint() == reward_before


def test_micro_batches_and_tokens_made_anew_change_nothing(backbone, reward):
    """What a large reward on one GPU needs: gradients of an accumulated batch, with target tokens that are not kept, are those of the whole one."""
    targets, tokens, norm = distilling.targets_of(reward, IMAGES)
    same, again, same_norm = distilling.targets_of(reward, IMAGES, most_bytes=1000)
    assert callable(again) and torch.equal(same, targets) and norm == same_norm
    torch.testing.assert_close(again(torch.tensor([4, 2])), tokens[[4, 2]].float(), atol=2e-3, rtol=2e-3)
    latents, trained = distilling.latents_of(backbone, IMAGES), []
    for micro, given in ((0, tokens), (5, lambda index: tokens[index])):
        torch.manual_seed(0)  # the residual branch starts at random
        model, _, _ = stitched(backbone, reward)
        distill(model, latents, targets, given, DistillConfig(steps=3, batch_size=16, micro_batch=micro, lr=1e-3, warmup=1, autocast=False))
        trained.append({n: p.detach() for n, p in model.named_parameters()})
    for name, value in trained[0].items():
        apart = (value - trained[1][name]).abs()  # Adam makes whole steps, of up to 5e-3, of gradients that are all but zero
        assert float((apart > 1e-4).float().mean()) < 0.02 and float(apart.max()) < 5e-3, name


def test_pictures_of_another_size_are_refused(backbone):
    with pytest.raises(UserError, match="20 x 20 pixels, the model takes 16 x 16"):
        distilling.latents_of(backbone, torch.zeros(1, 3, 20, 20))


def test_refreshing_inside_autocast_uses_the_new_weights(backbone, reward):
    """The casts that a caller's autocast keeps would be those of the first step, and every later gradient one of the old weights."""
    targets, tokens, _ = distilling.targets_of(reward, IMAGES)
    latents, ends = distilling.latents_of(backbone, IMAGES), []
    config = DistillConfig(steps=4, batch_size=8, lr=5e-3, warmup=1, decay=False)
    for outer in (False, True):
        torch.manual_seed(0)
        model, _, _ = stitched(backbone, reward)
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            patch.setattr("rlstitch.distributed.native_bf16", lambda _: True)
            distill(model, latents, targets, tokens, config)
        ends.append(model.tail.projection.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], atol=2e-3, rtol=0)  # with the old casts they are .025 apart


def test_sigma_law(generator):
    config = DistillConfig(sigma_mean=0.0, sigma_std=1.0)
    drawn = draw_sigma(50_000, config, (0.0, 1.0), generator)
    assert abs(drawn.median().item() - 0.5) < 0.01 and abs(torch.logit(drawn).std().item() - 1) < 0.02
    flat = draw_sigma(50_000, DistillConfig(uniform_share=1.0), (0.1, 0.8), generator)
    assert flat.min() == pytest.approx(0.1) and flat.max() == pytest.approx(0.8) and abs((flat < 0.45).float().mean() - 0.45) < 0.01


@pytest.mark.parametrize("j", [1, 2])
def test_value_gradient_by_finite_differences(backbone, reward, j):
    model, _, _ = stitched(backbone, reward, j=j)
    model = model.double()
    model.reward = SimpleNamespace(score_embedding=lambda e, batch: (e.double() * torch.arange(1.0, 13.0)).sum(-1), head=None)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = Latent(z.requires_grad_(True), torch.tensor([0.3, 0.8]))
    model.embed = lambda grid: (model.tail(model.stitch(grid))[0], None)
    gradient = torch.autograd.grad(model.value(latent, batch_of(["a", "b"])).sum(), latent.z)[0]
    direction, h = (
        torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        2e-3,
    )  # the denoiser's norms are float32 inside
    with torch.no_grad():
        ahead, behind = (model.value(Latent(z + s * h * direction, latent.sigma), batch_of(["a", "b"])).sum() for s in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / (2 * h)).item(), rel=2e-3)


def test_value_models_cut_at_one_block_share_one_prefix(backbone, reward):
    first, second = stitched(backbone, reward)[0], stitched(backbone, reward)[0]
    other = stitched(backbone, reward, i=1)[0]
    calls = []
    for m in (first, second, other):
        m.prefix.register_forward_hook(lambda *_: calls.append(1))
    latent = Latent(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.2]))
    got = values([first, second, other], latent, batch_of(["a", "b"]))
    assert len(calls) == 2 and got.shape == (2, 3)
    torch.testing.assert_close(got[:, 2], other.value(latent, batch_of(["a", "b"])))


def test_value_matches_interpolated_noise_levels(backbone, reward):
    """Per-sample sigma is honoured: a mixed batch equals its rows."""
    model, _, _ = stitched(backbone, reward)
    z = schedule.interpolate(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]))
    whole = model.value(Latent(z, torch.tensor([0.2, 0.7])), batch_of(["a", "b"]))
    rows = [model.value(Latent(z[k : k + 1], torch.tensor([s])), batch_of([p])) for k, (s, p) in enumerate(((0.2, "a"), (0.7, "b")))]
    torch.testing.assert_close(whole, torch.cat(rows), atol=1e-6, rtol=1e-5)


def test_a_value_by_hand(backbone, reward):
    """Prefix under the null text, stitch, tail; then the projection over `norm`, or of unit length. A tail that is entered late begins with the mean [CLS] there."""
    model, batch = stitched(backbone, reward)[0], batch_of(["a", "b"])
    z, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])
    raw = model.tail(model.stitch(model.prefix(z, sigma, backbone.null.expand(2)).grid))[0]
    for model.normalise, embedding in ((False, raw / 2), (True, raw / raw.norm(dim=-1, keepdim=True))):
        torch.testing.assert_close(model.value(Latent(z, sigma), batch), reward.score_embedding(embedding, batch))
    late, _, result = stitched(backbone, reward, j=2)
    assert torch.equal(late.tail.cls, result.cls[2].float()) and late.tail.cls.any()


class Casts(TorchDispatchMode):
    """Counts what is cast to another dtype: of the weights of a module, and all in all."""

    def __init__(self, module):
        super().__init__()
        self.weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.of_weights = self.all = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and found.dtype != arguments[0].dtype:
            self.all += 1
            self.of_weights += arguments[0].untyped_storage().data_ptr() in self.weights
        return found


def test_a_query_casts_no_weight_and_outside_autocast_nothing_more_than_inside(sd3_dir, clip_dir, tmp_path):
    backbone, reward = SD3Backbone(str(sd3_dir), max_sequence_length=0, dtype="bfloat16"), ClipReward(str(clip_dir), dtype="bfloat16")
    stitched(SD3Backbone(str(sd3_dir), max_sequence_length=0), ClipReward(str(clip_dir)))[0].save_pretrained(tmp_path, half=False)
    model = StitchedValueModel.from_pretrained(tmp_path, backbone=backbone, reward=reward)
    z, sigma, batch = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8]), batch_of(["a", "b"])

    def asked(autocast, gradient):
        """(casts of weights, all casts, values, slopes)."""
        leaf = z.clone().requires_grad_(gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Casts(model) as casts:
            value = model.value(Latent(leaf, sigma), batch)
            slope = torch.autograd.grad(value.sum(), leaf)[0] if gradient else torch.zeros_like(z)
        return casts.of_weights, casts.all, value.detach(), slope

    asked(False, False)  # the prompts' embeddings are kept from here on
    for gradient in (False, True):
        outside, inside = asked(False, gradient), asked(True, gradient)
        assert outside[0] == inside[0] == 0 and 0 < outside[1] <= inside[1]
        assert inside[2].dtype == outside[2].dtype == torch.float32
        torch.testing.assert_close(outside[2], inside[2], atol=0.02, rtol=0)
        assert F.cosine_similarity(outside[3].flatten(), inside[3].flatten(), 0) > 0.98 or not gradient
    model.thaw()  # what trains is float32, and cast where bf16 computes
    assert asked(True, False)[0] > 20


def test_a_value_is_loaded_in_its_rewards_precision_and_distilled_in_float32(sd3_dir, clip_dir, tmp_path):
    """A frozen float32 tail would be cast at every query; what trains is float32, and goes back."""
    kept = {}
    for dtype in ("float32", "bfloat16"):
        backbone, reward = SD3Backbone(str(sd3_dir), max_sequence_length=0, dtype=dtype), ClipReward(str(clip_dir), dtype=dtype)
        if dtype == "float32":
            stitched(backbone, reward)[0].save_pretrained(tmp_path, half=False)
        model = kept[dtype] = StitchedValueModel.from_pretrained(tmp_path, backbone=backbone, reward=reward)
        assert {p.dtype for part in (model.stitch, model.tail) for p in part.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
    z, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        full, half = (kept[d].value(Latent(z, sigma), batch_of(["a red circle", "two stars"])) for d in kept)
    assert full.dtype == half.dtype == torch.float32
    torch.testing.assert_close(full, half, atol=0.03, rtol=0)
    before = model.stitch.linear.weight.clone()
    assert {p.dtype for p in model.thaw().tail.parameters()} == {torch.float32} and all(p.requires_grad for p in model.stitch.parameters())
    with torch.no_grad():
        model.stitch.linear.weight.add_(1.0)
    assert torch.equal(model.freeze().stitch.linear.weight, (before.float() + 1).bfloat16())
