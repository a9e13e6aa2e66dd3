"""`shapes-large`: growing a transformer changes nothing at first, and what is stored of it becomes a whole pipeline directory again."""

import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel

from rlstitch.files import GROWN, GROWN_WEIGHTS, MADE, require, resolve, sha256, write_json, write_tensors
from rlstitch.shapes.pretrain.grow import grow, kept_places
from rlstitch.types import UserError


def out_of(transformer, seed=0):
    """Velocity of a fixed input."""
    g = torch.Generator().manual_seed(seed)
    z, context, pooled = torch.randn(2, 8, 16, 16, generator=g), torch.randn(2, 9, 128, generator=g), torch.randn(2, 128, generator=g)
    with torch.no_grad():
        return transformer(
            hidden_states=z,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=torch.tensor([300.0, 800.0]),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def old():
    return SD3Transformer2DModel.from_pretrained(require("shapes:shapes/transformer", "the transformer"), dtype=torch.float32)


@pytest.fixture
def stored(tmp_path, monkeypatch, old):
    """A folder as `pretrain_shapes` writes it beside its base, with new blocks that do something; and the transformer that was stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, folder = tmp_path / "shapes", tmp_path / "shapes-large"
    shutil.copytree(require("shapes:shapes", "the pipeline"), base)
    model, new = grow(old)
    for place in new:
        torch.nn.init.normal_(model.transformer_blocks[place].norm1.linear.weight, std=0.02, generator=torch.Generator().manual_seed(place))
    blocks = {k: v.half() for k, v in model.state_dict().items() if k.startswith(tuple(f"transformer_blocks.{p}." for p in new))}
    write_tensors(folder / GROWN_WEIGHTS, blocks)
    write_json(folder / "card.json", {"part": "shapes-large"})
    told = {"base": "shapes", "layers": 2 * old.config.num_layers, "kept": kept_places(old.config.num_layers)}
    told |= {"sha256": sha256(folder / GROWN_WEIGHTS), "base_sha256": sha256(base / "transformer" / "diffusion_pytorch_model.safetensors")}
    write_json(folder / GROWN, told)
    return folder, model.half().float()


def test_a_grown_transformer_starts_as_the_old_one_and_can_learn(old):
    model, new = grow(old)
    assert new == [1, 3, 5, 7, 9, 10] and len(model.transformer_blocks) == 12
    torch.testing.assert_close(out_of(model), out_of(old), rtol=0, atol=0)
    loss = model(
        hidden_states=torch.randn(1, 8, 16, 16), encoder_hidden_states=torch.randn(1, 4, 128), pooled_projections=torch.randn(1, 128),
        timestep=torch.tensor([500.0]), return_dict=False,
    )[0].square().mean()  # fmt: skip
    loss.backward()
    assert all(model.transformer_blocks[place].norm1.linear.weight.grad.abs().sum() > 0 for place in new)


def test_a_grown_pipeline_is_put_together_once(stored):
    folder, model = stored
    whole = resolve(folder)
    assert whole != folder and (whole / "model_index.json").exists()
    loaded = SD3Transformer2DModel.from_pretrained(whole / "transformer", dtype=torch.float32)
    torch.testing.assert_close(out_of(loaded), out_of(model))
    made = (whole / "model_index.json").stat().st_mtime_ns
    assert resolve(folder) == whole and (whole / "model_index.json").stat().st_mtime_ns == made
    assert sorted(p.name for p in whole.parent.iterdir()) == [".lock", whole.name]


@pytest.mark.parametrize("harm", ["cut", "zeroed", "gone", "of an older version"])
def test_a_grown_pipeline_that_is_not_as_it_was_made_is_made_anew(stored, harm, capsys):
    folder, model = stored
    whole = resolve(folder)
    file = whole / "transformer" / "diffusion_pytorch_model.safetensors"
    right = file.read_bytes()
    if harm == "gone":
        (whole / "vae" / "config.json").unlink()
    elif harm == "of an older version":
        (whole / MADE).unlink()
    else:
        file.write_bytes(right[:1000] if harm == "cut" else right[: len(right) // 2] + bytes(len(right) - len(right) // 2))
    assert resolve(folder) == whole and file.read_bytes() == right and (whole / "vae" / "config.json").exists()
    assert resolve(folder) == whole and capsys.readouterr().out.count(f"{whole} holds what is not as it was written") == 1


def test_other_blocks_or_another_base_are_refused(stored):
    folder, _ = stored
    base = folder.parent / "shapes" / "transformer" / "diffusion_pytorch_model.safetensors"
    base.write_bytes(base.read_bytes()[:-2] + b"\0\1")
    with pytest.raises(UserError, match="is not the file that was saved"):
        resolve(folder)
    assert [p.name for p in (folder.parent / "cache" / "rlstitch").iterdir()] == [".lock"]


def test_the_shipped_large_model_outgrew_the_shipped_one():
    """Same autoencoder and text, twice the depth: a value model of one reads the other's latents."""
    from rlstitch.fingerprints import vae_fingerprint

    whole = require("shapes:shapes-large", "the grown pipeline")
    assert vae_fingerprint(whole) == vae_fingerprint("shapes:shapes")
    assert SD3Transformer2DModel.from_pretrained(whole / "transformer").config.num_layers == 12
