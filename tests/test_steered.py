"""Sharing between denoiser and value, and stock pipelines steered by callbacks."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from rlstitch import sampling, schedule, steering
from rlstitch.oracles import Stitched, Terminal, Tweedie
from rlstitch.steering.model import Steered
from rlstitch.steering.pipeline import GradientGuide, ParticleGuide, flow_sigma
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Batch, Latent, UserError, noise_like

PROMPTS = ["a red circle", "two blue stars"]


@pytest.fixture
def values(backbone, reward):
    """Two untrained value models cut at different blocks of the same denoiser."""
    torch.manual_seed(0)

    def stitched(blocks):
        return StitchedValueModel.from_search(
            backbone, reward, blocks, 1, torch.randn(reward.width, backbone.width) * 0.2, torch.zeros(reward.width),
            cls_state=torch.zeros(reward.width), norm=1.0, normalise=True, sigma_range=(0.0, 1.0), card={},
        ).requires_grad_(False).eval()  # fmt: skip

    return {"a": stitched(1), "b": stitched(2)}


def batch_of(backbone):
    index = torch.arange(len(PROMPTS))
    return Batch(PROMPTS, index, index, [{}] * len(PROMPTS), backbone.encode_prompts(PROMPTS))


def oracles(backbone, reward, values):
    return {
        "stitched": Stitched(values, {"a": 1.0, "b": -0.5}),
        "tweedie": Tweedie(backbone, {"r": reward}, {"r": 1.0}),
        "terminal": Terminal(backbone, {"r": reward}, {"r": 1.0}),
    }


class Count:
    """How many sample-rows some blocks have run, all together."""

    def __init__(self, *blocks):
        self.rows = 0
        for block in blocks:
            block.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module, args, kwargs, output):
        self.rows += len(kwargs["hidden_states"])


@pytest.mark.parametrize("which", ["stitched", "tweedie"])
@pytest.mark.parametrize("guidance, guided", [(1.0, True), (4.0, True), (4.0, False)])
def test_sharing_changes_nothing(backbone, reward, values, which, guidance, guided):
    batch, oracle = batch_of(backbone), oracles(backbone, reward, values)[which]
    grid = schedule.sigmas(4, 3.0, "plain")
    z = noise_like(backbone.latent_shape, torch.arange(4))
    runs = []
    for share in (True, False):
        steered = Steered(backbone, oracle, batch, guidance=guidance, guided_tweedie=guided, share=share)
        runs.append(
            [
                steering.dps(steered.velocity, steered.value, z, grid, scale=0.5),
                steering.fk(
                    steered.velocity, steered.value, z, grid, num_particles=2, num_proposals=2, proposal_steps=(0, 1), resample_steps=(1, 2), lam=3.0,
                    generator=torch.Generator().manual_seed(0),
                ),
                steering.best_of_n(steered.velocity, steered.value, z, grid, num_particles=2, stop=2),
            ]
        )  # fmt: skip
    for shared, alone in zip(*runs):
        torch.testing.assert_close(shared, alone, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("which", ["stitched", "tweedie", "terminal"])
def test_siblings_do_not_tie_inside_autocast(backbone, reward, values, which):
    """Children that differ little: a total rounded to bf16 would be the same for most of them, and the first would win. The best is that of the total in float64."""
    oracle = oracles(backbone, reward, values)[which]
    oracle.weights = [1.0 + 0.3 * k for k in range(len(oracle.weights))]
    steered = Steered(backbone, oracle, batch_of(backbone))
    m, sigma = 16, 0.0 if which == "terminal" else 0.4
    z = noise_like(backbone.latent_shape, torch.arange(2)).repeat_interleave(m, 0)
    z = z + 0.05 * noise_like(backbone.latent_shape, 10 + torch.arange(2 * m))
    levels = torch.full((2 * m,), sigma)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        told = steered.value(z, levels)
        exact = (oracle(Latent(z, levels), batch_of(backbone).interleave(m)).double() * torch.tensor(oracle.weights)).sum(1)
    assert told.dtype == torch.float32 and all(len(row.unique()) == m for row in told.view(2, m))
    assert all(len(row.bfloat16().unique()) < m for row in exact.view(2, m))  # in bf16 many would tie
    torch.testing.assert_close(told.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("share, branches", [(True, 2), (False, 3)])
def test_the_null_prefix_runs_once_a_step(backbone, reward, values, share, branches):
    """Guided DPS: the first block runs for the conditional branch and once for the null text, which guidance and value share."""
    value, steps, b = values["a"], 4, 2
    steered = Steered(backbone, Stitched({"a": value}, {"a": 1.0}), batch_of(backbone), guidance=4.0, share=share)
    first, last = (
        Count(backbone.transformer.transformer_blocks[0], value.prefix.blocks[0]),
        Count(backbone.transformer.transformer_blocks[-1]),
    )
    steering.dps(
        steered.velocity, steered.value, noise_like(backbone.latent_shape, torch.arange(b)), schedule.sigmas(steps, 3.0, "plain"), scale=0.5
    )
    assert (first.rows, last.rows) == (branches * b * steps, 2 * b * steps)


@pytest.mark.parametrize("guidance, branches, null", [(1.0, 1, False), (4.0, 2, False), (4.0, 2, True)])
def test_a_value_under_the_prompts_text_is_the_conditional_branch(backbone, reward, values, guidance, branches, null):
    """The first block runs once a step for the prompt, which velocity and value share, and under guidance once for the null text, which a value of that text shares."""
    values["a"].card = {"text": "prompt"}
    weights = {"a": 1.0, "b": 1.0} if null else {"a": 1.0}
    z, grid, runs = noise_like(backbone.latent_shape, torch.arange(4)), schedule.sigmas(4, 3.0, "plain"), []
    for share in (True, False):
        steered = Steered(backbone, Stitched(values, weights), batch_of(backbone), guidance=guidance, share=share)
        first = Count(backbone.transformer.transformer_blocks[0], *(values[name].prefix.blocks[0] for name in weights))
        runs.append(
            steering.fk(
                steered.velocity,
                steered.value,
                z,
                grid,
                num_particles=2,
                resample_steps=(0, 1, 2),
                lam=3.0,
                generator=torch.Generator().manual_seed(0),
            )
        )
        if share:  # the finished latents' value has no velocity after it
            assert first.rows == 4 * (4 * branches + len(weights))
    torch.testing.assert_close(*runs, atol=2e-4, rtol=1e-3)


def test_a_tweedie_value_is_the_next_steps_velocity(backbone, reward, values):
    batch, grid = batch_of(backbone), schedule.sigmas(4, 3.0, "plain")
    steered = Steered(backbone, oracles(backbone, reward, values)["tweedie"], batch, guidance=4.0)
    count = Count(backbone.transformer.transformer_blocks[0])
    z = noise_like(backbone.latent_shape, torch.arange(4))
    steering.fk(steered.velocity, steered.value, z, grid, num_particles=2, resample_steps=(0, 1, 2), lam=3.0)
    assert count.rows == 4 * 2 * 4  # 4 steps, both branches, 4 latents: the values cost no call of the denoiser
    alike, sigma = z[:1].repeat(2, 1, 1, 1), torch.full((2,), 0.5)  # one latent under two prompts is two
    with torch.no_grad():
        steered.value(alike, sigma)
        torch.testing.assert_close(steered.velocity(alike, sigma), backbone.velocity(alike, sigma, batch.text, guidance=4.0))


def test_an_adapter_on_the_denoiser_ends_the_sharing(backbone, reward, values):
    from rlstitch.policy import Policy

    policy = Policy(backbone.transformer, rank=2, alpha=4.0, targets=backbone.lora_targets, seed=0, ema_decay=0.9)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.2)
    batch, oracle = batch_of(backbone), oracles(backbone, reward, values)["stitched"]
    z, sigma = noise_like(backbone.latent_shape, torch.arange(2)), torch.full((2,), 0.5)
    steered = Steered(backbone, oracle, batch, guidance=4.0)
    with torch.no_grad():
        assert not steered._depths
        torch.testing.assert_close(steered.value(z, sigma), oracle.total(oracle(Latent(z, sigma), batch)))
        torch.testing.assert_close(steered.velocity(z, sigma), backbone.velocity(z, sigma, batch.text, guidance=4.0))


def test_rows_must_fit_the_prompts(backbone, reward, values):
    steered = Steered(backbone, oracles(backbone, reward, values)["stitched"], batch_of(backbone))
    with pytest.raises(ValueError, match="3 latents are no multiple of the 2 prompts"):
        steered.velocity(noise_like(backbone.latent_shape, torch.arange(3)), torch.full((3,), 0.5))


# ---------------------------------------------------------------------------------------------------- stock pipelines


@pytest.fixture
def pipe(sd3_dir):
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_dir, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **options):
    z = noise_like((4, 8, 8), torch.arange(len(PROMPTS) * options.get("num_images_per_prompt", 1)))
    return pipe(
        PROMPTS, num_inference_steps=6, guidance_scale=3.0, max_sequence_length=0, output_type="latent", latents=z, **options
    ).images


def test_a_pipeline_is_steered_by_gradient(pipe, backbone, values):
    value, seen = values["b"], {}
    batch = Batch(PROMPTS, torch.arange(2), torch.arange(2))

    def v_of(z):
        return value.value(Latent(z, torch.zeros(2)), batch).mean().item()

    plain = call(pipe)
    for scale in (0.0, 30.0, -30.0):
        seen[scale] = call(pipe, callback_on_step_end=GradientGuide(value, PROMPTS, scale=scale))
    assert torch.equal(seen[0.0], plain)
    assert v_of(seen[-30.0]) < v_of(plain) < v_of(seen[30.0])


def test_a_gradient_step_by_hand():
    """After step k the latents lie at sigma[k + 1], and gain by the length of the step to come: here of V = sigma sum z, whose gradient is sigma."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)

    class Value:
        sigma_range = (0.0, 1.0)

        def __call__(self, latent, batch):
            return (latent.sigma * latent.z.flatten(1).sum(1))[:, None]

        def total(self, scores):
            return scores[:, 0]

    guide, z = GradientGuide(Value(), PROMPTS, scale=2.0, steps=(2, 4)), noise_like((4, 8, 8), torch.arange(2))
    s = scheduler.sigmas.tolist()
    for step in range(5):
        moved = guide(SimpleNamespace(scheduler=scheduler), step, None, {"latents": z})["latents"]
        gain = (s[3] - s[4]) * 2 * s[3] / (1 - s[3]) * s[3] if step == 2 else 0.0  # after step 4 there is none to come
        torch.testing.assert_close(moved, z + gain)


def test_the_gradient_guide_is_dps_to_first_order(pipe, backbone, values):
    """With many steps the callback's operator splitting and steering.dps end in the same place."""
    z = noise_like(backbone.latent_shape, torch.arange(2))
    oracle = Stitched({"a": values["a"]}, {"a": 1.0})
    ends = []
    for steps in (20, 80):
        steered = Steered(backbone, oracle, batch_of(backbone), guidance=3.0)
        ours = steering.dps(steered.velocity, steered.value, z, schedule.sigmas(steps, 3.0), scale=3.0)
        theirs = pipe(
            PROMPTS, num_inference_steps=steps, guidance_scale=3.0, max_sequence_length=0, output_type="latent", latents=z,
            callback_on_step_end=GradientGuide(values["a"], PROMPTS, scale=3.0),
        ).images  # fmt: skip
        ends.append(((ours - theirs).norm() / ours.norm()).item())
    plain = sampling.sample(backbone.bind(batch_of(backbone).text, 3.0), z, schedule.sigmas(80, 3.0)).z
    moved = ((ours - plain).norm() / ours.norm()).item()
    assert ends[1] < 0.5 * ends[0] and ends[1] < 0.1 * moved


def test_a_pipeline_is_steered_by_particles(pipe, values):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    value, n = values["b"], 8

    def run(lam):
        guide = ParticleGuide(value, PROMPTS, num_particles=n, resample_steps=(2, 3), lam=lam, generator=torch.Generator().manual_seed(0))
        z = call(pipe, num_images_per_prompt=n, callback_on_step_end=guide, generator=torch.Generator().manual_seed(1))
        wide = Batch(PROMPTS, torch.arange(2), torch.arange(2)).interleave(n)
        return value.value(Latent(z, torch.zeros(2 * n)), wide).view(2, n), guide.trace

    (low, _), (high, trace) = run(0.0), run(200.0)
    assert high.mean() > low.mean() and trace.queries == 3 * 2 * n and len(trace.ess) == 3


def test_what_a_guide_refuses(pipe, values):
    value = values["a"]
    with pytest.raises(UserError, match="adds no noise"):
        call(
            pipe, num_images_per_prompt=2, callback_on_step_end=ParticleGuide(value, PROMPTS, num_particles=2, resample_steps=(1,), lam=1.0)
        )
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(UserError, match="num_images_per_prompt=4"):
        call(
            pipe, num_images_per_prompt=2, callback_on_step_end=ParticleGuide(value, PROMPTS, num_particles=4, resample_steps=(1,), lam=1.0)
        )
    with pytest.raises(UserError, match=r"\[9\] lie beyond"):
        call(
            pipe, num_images_per_prompt=2, callback_on_step_end=ParticleGuide(value, PROMPTS, num_particles=2, resample_steps=(9,), lam=1.0)
        )
    with pytest.raises(UserError, match="no prompt"):
        GradientGuide(value, [])
    with pytest.raises(UserError, match="no multiple of the 3 prompts"):
        call(pipe, callback_on_step_end=GradientGuide(value, [*PROMPTS, "a square"]))
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler"):
        flow_sigma(pipe, 0)
