"""One value query against one Tweedie query, same batch, one run: time forward and with gradient, peak memory, and the floor of the stitched query's parts.

python -m benchmarks.value_query [batch=32] [repeats=15] [value=shapes:value_clip]
"""

import torch

from benchmarks.common import arguments, interleaved, peak_megabytes, save
from rlstitch.backbones import Diffusers
from rlstitch.oracles import Stitched, Tweedie
from rlstitch.rewards.clip import ClipReward
from rlstitch.stitch.model import StitchedValueModel
from rlstitch.types import Batch, Latent


def main() -> None:
    options = arguments({"batch": "32", "repeats": "15", "value": "shapes:value_clip"})
    n = int(options["batch"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = Diffusers("shapes:shapes", max_sequence_length=0, device=device)
    reward = ClipReward("shapes:clip", device=device)
    model = StitchedValueModel.from_pretrained(options["value"], backbone=backbone, reward=reward)
    prompts = ["a red circle and a blue star"] * n
    batch = Batch(prompts, torch.arange(n), torch.arange(n), [{}] * n, backbone.encode_prompts(prompts))
    z = torch.randn(n, *backbone.latent_shape, device=device)
    sigma = torch.full((n,), 0.5, device=device)
    oracles = {"tweedie": Tweedie(backbone, {"clip": reward}, {"clip": 1.0}), "stitched": Stitched({"clip": model}, {"clip": 1.0})}

    def forward(oracle):
        with torch.no_grad():
            return oracle(Latent(z, sigma), batch)

    def gradient(oracle):
        leaf = z.clone().requires_grad_(True)
        return torch.autograd.grad(oracle(Latent(leaf, sigma), batch).sum(), leaf)

    with torch.no_grad():
        grid = model.activations(z, sigma).grid.contiguous()

    def prefix(with_gradient: bool):
        leaf = z.clone().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            out = model.activations(leaf, sigma).grid
        return torch.autograd.grad(out, leaf, torch.ones_like(out)) if with_gradient else out

    def tail(with_gradient: bool):
        leaf = grid.clone().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            out = model.embed(leaf)[0]
        return torch.autograd.grad(out, leaf, torch.ones_like(out)) if with_gradient else out

    cases = {
        f"{name}_{kind}": (lambda o=oracle, f=function: f(o))
        for name, oracle in oracles.items()
        for kind, function in (("forward", forward), ("gradient", gradient))
    }
    for kind, flag in (("forward", False), ("gradient", True)):
        cases[f"prefix_{kind}"], cases[f"tail_{kind}"] = (lambda f=flag: prefix(f)), (lambda f=flag: tail(f))
    seconds = interleaved(cases, int(options["repeats"]))
    memory = {name: peak_megabytes(lambda o=oracle: gradient(o)) for name, oracle in oracles.items()}
    ratios = {f"{kind}_stitched_over_tweedie": seconds[f"stitched_{kind}"] / seconds[f"tweedie_{kind}"] for kind in ("forward", "gradient")}
    ratios |= {
        f"{kind}_stitched_over_parts": seconds[f"stitched_{kind}"] / (seconds[f"prefix_{kind}"] + seconds[f"tail_{kind}"])
        for kind in ("forward", "gradient")
    }
    ratios["gradient_memory_stitched_over_tweedie"] = memory["stitched"] / memory["tweedie"]
    wanted = {
        "forward_stitched_over_tweedie": 1 / 2,
        "gradient_stitched_over_tweedie": 1 / 2.5,
        "gradient_memory_stitched_over_tweedie": 1 / 3,
        "forward_stitched_over_parts": 1.15,
        "gradient_stitched_over_parts": 1.15,
    }
    save(
        "value_query",
        {"batch": n, "blocks": model.prefix.depth, "ratios": {k: round(v, 4) for k, v in ratios.items()}, "at_most": wanted},
    )


if __name__ == "__main__":
    main()
