"""Pictures that the tiny world's model can encode, as a recipe's data.images names them."""

import torch

PROMPTS = [f"{n} {c} {s}" for n in ("a", "two") for c in ("red", "blue") for s in ("circle", "star")]


def tiny(n: int = 8, seed: int = 0):
    """n pictures [n, 3, 16, 16] uint8 of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator), [PROMPTS[k % 8] for k in range(n)]


def tiny_pairs(n: int = 8, seed: int = 0):
    """n pairs [n, 2, 3, 16, 16] uint8 of noise, the brighter one first."""
    better, prompts = tiny(n, seed)
    return torch.stack([better, better // 2], 1), prompts


def without_reward(world):
    """A copy of the tiny recipe, free.yaml, that has neither oracle nor stop."""
    lines = (world / "recipe.yaml").read_text().splitlines()
    (world / "free.yaml").write_text("\n".join(line for line in lines if not line.startswith(("oracle:", "stop:"))))
    return "free.yaml"
