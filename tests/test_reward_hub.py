"""Rewards by hub id: what is fetched of a repository in open_clip's layout, of one file, of a head and a tokenizer elsewhere, and what is kept of where they came from."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from rlstitch import config as cfg
from rlstitch import hub, parts
from rlstitch.part_checks import reward_faults
from rlstitch.rewards.clip import ClipReward
from rlstitch.types import Batch, UserError
from tests.test_clip_family import TARGET, write_open_clip
from tests.test_hub import FIRST, online  # noqa: F401
from tests.test_imagereward import files as blip  # noqa: F401
from tests.test_qwen import files as qwen  # noqa: F401


def test_of_a_repository_in_open_clips_layout_one_file_is_fetched(online, tmp_path):  # noqa: F811
    folder = tmp_path / "published"
    folder.mkdir()
    write_open_clip(folder / "open_clip_pytorch_model.bin", quick=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"resize_mode": "squash"}})
    )
    for other in ("epoch_1.pt", "README.md", "model.onnx", "flax_model.msgpack"):
        (folder / other).write_bytes(b"x")
    online.put(name := "someone/tiny-dfn", folder)
    node = {"_target_": TARGET, "path": name}
    assert not reward_faults("rewards.r", node) and not [n for n in online.asked if n.endswith((".bin", ".pt"))]
    config = SimpleNamespace(model={}, rewards={"r": dict(node)}, check=True)
    assert not parts.at_hand(config) and config.rewards["r"]["path"] == f"{name}@{FIRST}"
    assert "1 file, " in parts.to_fetch(config)[0] and "would be fetched" in parts.to_fetch(config)[0]
    config.check = False
    assert parts.at_hand(config) and [n for n in online.asked if n.endswith((".bin", ".pt"))] == ["open_clip_pytorch_model.bin"]
    assert "in the hub cache" in parts.to_fetch(config)[0] and not parts.at_hand(config)
    reward = ClipReward(f"{name}@{FIRST}")
    assert (
        reward.fingerprint() == ClipReward(str(folder / "open_clip_pytorch_model.bin")).fingerprint()
        and reward.preprocessing.edge[0] == "exact"
    )
    assert not reward_faults("rewards.r", config.rewards["r"]) and ClipReward.cut_prompts(config.rewards["r"], ["a red circle"]) == []


def test_a_model_of_transformers_comes_before_what_else_a_repository_holds(online, clip_dir, tmp_path):  # noqa: F811
    folder = shutil.copytree(clip_dir, tmp_path / "clip")
    for other in ("open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_model.safetensors"):
        (folder / other).write_bytes(b"x")
    online.put("laion/tiny", folder)
    assert ClipReward("laion/tiny").fingerprint() == ClipReward(str(clip_dir)).fingerprint()
    assert [n for n in online.asked if n.endswith((".bin", ".safetensors"))] == ["model.safetensors"]


def test_a_file_a_head_and_a_tokenizer_by_hub_id(online, clip_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    weights = tmp_path / "weights"
    (weights / "sub").mkdir(parents=True)
    model = write_open_clip(weights / "sub" / "tiny-hps.pt")
    (weights / "other.pt").write_bytes(b"x")
    width = model.visual.proj.shape[1]
    torch.save({"layers.0.weight": torch.ones(1, width), "layers.0.bias": torch.zeros(1)}, weights / "head+1.pth")
    online.put("someone/weights", weights)
    online.put("someone/words", clip_dir)
    node = {
        "_target_": TARGET,
        "path": "someone/weights/sub/tiny-hps.pt",
        "tokenizer": "someone/words",
        "head": "someone/weights/head+1.pth",
    }
    assert not reward_faults("rewards.r", node) and not [n for n in online.asked if n.endswith((".pt", ".pth"))]
    config = SimpleNamespace(model={}, rewards={"r": dict(node)}, check=True)
    assert not parts.at_hand(config)
    pinned = {
        "path": f"someone/weights/sub/tiny-hps.pt@{FIRST}",
        "tokenizer": f"someone/words@{FIRST}",
        "head": f"someone/weights/head+1.pth@{FIRST}",
    }
    assert config.rewards["r"] == node | pinned == parts.pinned(node)
    assert [line.split(": ", 1)[1].split(", ")[0] for line in parts.to_fetch(config)] == ["1 file", "1 file", "in the hub cache"]
    assert not [n for n in online.asked if n.endswith((".pt", ".pth"))]
    config.check = False
    assert parts.at_hand(config)
    assert sorted(n for n in online.asked if n.endswith((".pt", ".pth", ".safetensors"))) == ["head+1.pth", "sub/tiny-hps.pt"]
    options = {k: v for k, v in config.rewards["r"].items() if k not in ("_target_", "head")}
    assert ClipReward(**options).fingerprint() == ClipReward(str(weights / "sub" / "tiny-hps.pt")).fingerprint()
    assert ClipReward(**options, head=pinned["head"]).head is not None
    assert "1 file, 0.0 MB of weights is fetched" in capsys.readouterr().out

    faults = reward_faults("rewards.r", node | {"path": "someone/weights/none.pt", "head": "someone/weights/none.pth"})
    assert (
        "'rewards.r.path': someone/weights has no file none.pt: it has head+1.pth, other.pt, sub/tiny-hps.pt" in faults[0]
        and "'rewards.r.head'" in faults[1]
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not reward_faults("rewards.r", config.rewards["r"])
    (fault,) = reward_faults("rewards.r", {"_target_": TARGET, "path": "xswu/HPSv2/HPS_v2.1_compressed.pt", "tokenizer": "someone/words"})
    assert "run hf download xswu/HPSv2 'HPS_v2.1_compressed.pt'" in fault and "\n" not in fault
    with pytest.raises(UserError, match="hf download someone/new 'a.pth'"):
        ClipReward(str(clip_dir), head="someone/new/a.pth")
    assert hub.parsed_file("someone/weights/other.pt") is None  # a LoRA is never a pickle
    assert Path(hub.fetch(pinned["path"], [])).is_file()


def test_models_of_other_kinds_are_taken_by_their_file_at_the_hub(online, blip, qwen, tmp_path, monkeypatch):  # noqa: F811
    words, weights = shutil.copytree(blip / "bert", tmp_path / "words"), tmp_path / "weights"
    (words / "config.json").write_text("{}")
    weights.mkdir()
    shutil.copy(blip / "ImageReward.pt", weights)
    shutil.copy(qwen[0] / "new.safetensors", weights / "HPSv3.safetensors")
    for name, folder in {
        "zai-org/ImageReward": weights, "google-bert/bert-base-uncased": words, "MizzenAI/HPSv3": weights, "Qwen/Qwen2-VL-7B-Instruct": qwen[0]
    }.items():  # fmt: skip
        online.put(name, folder)
    monkeypatch.chdir(tmp_path)
    rewards = {name: dict(RECIPES[name][name]) for name in ("imagereward", "hpsv3")}
    (fault,) = [f for name, node in rewards.items() for f in reward_faults(name, node)]
    assert "'hpsv3.instruction': the instruction 'hpsv3_instruction.txt' is not there" in fault
    (tmp_path / "hpsv3_instruction.txt").write_text("rate {prompt} <|Reward|>")
    assert not [f for name, node in rewards.items() for f in reward_faults(name, node)]
    assert not [n for n in online.asked if n.endswith((".pt", ".safetensors"))]
    assert parts.at_hand(SimpleNamespace(model={}, rewards=rewards, check=False))
    assert rewards["hpsv3"]["base"] == f"Qwen/Qwen2-VL-7B-Instruct@{FIRST}" and rewards["imagereward"]["path"].endswith(f".pt@{FIRST}")
    batch = Batch(["a red cat"], torch.zeros(1), torch.zeros(1))
    for node in rewards.values():
        assert torch.isfinite(cfg.build(node, kind="reward").score(torch.rand(1, 3, 40, 40), batch)).all()


RECIPES = {p.stem: cfg.compose(f"reward/{p.stem}")["rewards"] for p in (cfg.RECIPES / "reward").glob("*.yaml")}
FAMILY = {
    f"{stem}.{name}": node
    for stem, nodes in RECIPES.items()
    for name, node in nodes.items()
    if node["_target_"] == TARGET and stem != "shapes"
}


def test_every_recipe_of_the_family_lacks_nothing_but_files():
    assert {"pickscore", "hpsv21", "hpsv2", "clip_l14", "clip_l14_336", "dfn5b", "siglip", "siglip2", "aesthetic_v2", "aesthetic_v25"} <= {
        k.split(".")[0] for k in FAMILY
    }
    for where, node in FAMILY.items():
        faults = reward_faults(where, node)
        assert faults and all("is not in the hub cache" in f or "is not there" in f for f in faults), faults
        assert not cfg.check_part(where, node, kind="reward") and hub.ids_of(node)
