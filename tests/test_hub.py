"""Models by hub id, without a network: a hub that lies in a folder stands for the real one, and the client's own code reads the cache that it fills."""

import fnmatch
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from rlstitch import adapters, checks, describe, downloads, hub, part_checks, parts, steer
from rlstitch import config as cfg
from rlstitch.backbones import Diffusers, directory
from rlstitch.files import STEMS, write_tensors
from rlstitch.fingerprints import same_vae, vae_names
from rlstitch.resume import keep_commits, resumable
from rlstitch.rewards.clip import ClipReward
from rlstitch.stitch import recipe as stitch
from rlstitch.types import UserError

FIRST, SECOND = "a" * 40, "b" * 40
MODEL, REWARD = "someone/tiny-sd3", "someone/tiny.clip"
REAL = huggingface_hub.snapshot_download


class Hub:
    """Repositories by name, each with its commits by revision and the files of a commit; `asked` keeps what is fetched, `fails` what a name raises instead."""

    def __init__(self, cache: Path):
        self.cache, self.asked, self.fails = cache, [], {}
        self.commits: dict[tuple[str, str], str] = {}
        self.files: dict[tuple[str, str], Path] = {}

    def put(self, name: str, folder: Path, commit: str = FIRST, revision: str = "main") -> None:
        self.commits[name, revision] = self.commits[name, commit] = commit
        self.files[name, commit] = folder

    def _folder(self, name: str, revision: str | None) -> tuple[Path, str]:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("offline mode is enabled")
        if name in self.fails:
            raise self.fails[name]
        if not any(name == known for known, _ in self.commits):
            raise error(errors.RepositoryNotFoundError)
        if (name, revision or "main") not in self.commits:
            raise error(errors.RevisionNotFoundError)
        commit = self.commits[name, revision or "main"]
        return self.files[name, commit], commit

    def snapshot_download(self, name, *, revision=None, local_files_only=False, allow_patterns=None, ignore_patterns=None, tqdm_class=None):
        if local_files_only:
            return REAL(name, revision=revision, local_files_only=True, allow_patterns=allow_patterns)
        folder, commit = self._folder(name, revision)
        home = self.cache / f"models--{name.replace('/', '--')}"
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            inside = str(file.relative_to(folder))
            any_of = lambda patterns: any(fnmatch.fnmatch(inside, p) for p in patterns or ())  # noqa: B023, E731
            link = home / "snapshots" / commit / inside
            if any_of(allow_patterns) and not any_of(ignore_patterns):
                self.asked.append(inside)
                blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
                for path in (blob, link):
                    path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, blob)
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        if revision != commit:
            (home / "refs").mkdir(parents=True, exist_ok=True)
            (home / "refs" / (revision or "main")).write_text(commit)
        tqdm_class(total=0, unit="B", desc="its own bar", name="x").update(1)
        return str(home / "snapshots" / commit)

    def model_info(self, name, *, revision=None, files_metadata=False):
        folder, commit = self._folder(name, revision)
        files = [SimpleNamespace(rfilename=str(p.relative_to(folder)), size=p.stat().st_size) for p in folder.rglob("*") if p.is_file()]
        return SimpleNamespace(sha=commit, siblings=files)


def error(cls):
    return cls("404 Client Error", response=httpx2.Response(404, request=httpx2.Request("GET", "hub:x")))


@pytest.fixture
def online(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(hub, "AGAIN", 0.0)
    hub._listing.cache_clear()
    hub._asked.clear()
    return found


@pytest.fixture
def repo(sd3_dir, tmp_path):
    """A pipeline as it is published: with weights in several formats and numbers, and much beside it."""
    folder = shutil.copytree(sd3_dir, tmp_path / "repo")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        whole = next(f for stem in STEMS if (f := folder / part / f"{stem}.safetensors").is_file())
        shutil.copy(whole, whole.with_name(f"{whole.stem}.fp16.safetensors"))
        for suffix in (".bin", ".msgpack", ".onnx"):
            whole.with_suffix(suffix).write_bytes(b"pickle")
    shards = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / shards[0])
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "transformer" / shards[0])
    names = sorted(tensors)
    where = {name: shards[k % 2] for k, name in enumerate(names)}
    for shard in shards:
        save_file({n: tensors[n] for n in names if where[n] == shard}, folder / "transformer" / shard, metadata={"format": "pt"})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    for extra in ("tiny.safetensors", "tiny.ckpt", "text_encoders/t5.safetensors", "README.md", "pipeline.py", "tokenizer/code.py"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ x }}")
    return folder


WEIGHTS = {
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
}  # fmt: skip


def recipe(which: str, **more):
    given = cfg.merge(cfg.compose(which), {"model": {"path": MODEL, "max_sequence_length": 0}, "threads": 1})
    return cfg.merge(given, more)


def test_only_what_is_needed_is_fetched_and_it_is_the_model_that_a_folder_holds(online, repo, sd3_dir, monkeypatch, capsys):
    online.put(MODEL, repo)
    parts_of = directory.needs({"path": MODEL})
    assert parts_of == ["transformer", "vae", "text_encoder", "text_encoder_2"]
    small = set(online.asked)
    assert small == {str(f.relative_to(repo)) for f in repo.rglob("*") if f.suffix in (".json", ".txt", ".jinja")}
    assert online.asked[-1] == "model_index.json"  # what was cut short is known by it
    assert not directory.faults({"path": MODEL}) and set(online.asked) == small
    assert hub.missing(MODEL, parts_of) == {name: (repo / name).stat().st_size for name in WEIGHTS}

    online.asked.clear()
    backbone = Diffusers(MODEL, max_sequence_length=0)
    assert set(online.asked) == WEIGHTS and "5 files, 0." in capsys.readouterr().out
    assert (backbone.path.name, hub.pinned(MODEL)) == (FIRST, f"{MODEL}@{FIRST}") and not hub.missing(MODEL, parts_of)
    assert all(f.is_symlink() for f in backbone.path.rglob("*") if f.is_file())

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # all of it is there: nobody is asked
    plain = Diffusers(str(repo), max_sequence_length=0)
    z, sigma = torch.randn(1, *plain.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    ours, theirs = (b.velocity(z, sigma, b.encode_prompts(["a red square"])) for b in (backbone, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # tensors of shards lie elsewhere in memory
    assert not directory.faults({"path": MODEL})
    assert vae_names(MODEL) == vae_names(repo) and same_vae(vae_names(sd3_dir), f"{MODEL}@{FIRST}")
    assert backbone.text_fingerprint() == plain.text_fingerprint()
    assert backbone.make_prefix(1).fingerprint() == plain.make_prefix(1).fingerprint()


def test_one_variant_of_the_weights_is_fetched(online, repo, clip_dir, tmp_path):
    online.put(MODEL, repo)
    fp16 = {"vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors"}
    (repo / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # a part without it has its plain ones
    shards = {name for name in WEIGHTS if name.startswith("transformer")}
    assert set(hub.missing(MODEL, directory.needs({"path": MODEL}), "fp16")) == fp16 | shards
    online.asked.clear()
    hub.fetch(MODEL, ["vae"], "fp16")
    assert online.asked == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    assert set(hub.missing(MODEL, ["vae"])) == {"vae/diffusion_pytorch_model.safetensors"}  # the plain ones are others

    published = shutil.copytree(clip_dir, tmp_path / "clip")  # a model that has no parts
    (published / "pytorch_model.bin").write_bytes(b"pickle")
    online.put(REWARD, published)
    assert not ClipReward.faults({"path": REWARD}) and not any("safetensors" in f.name for f in hub.model_folder(REWARD).iterdir())
    online.asked.clear()
    reward = ClipReward(REWARD)
    assert online.asked == ["model.safetensors"] and reward.fingerprint() == ClipReward(str(clip_dir)).fingerprint()


def test_a_recipe_names_the_commit_and_its_run_keeps_it(online, repo, sd3_dir, tmp_path, monkeypatch):
    online.put(MODEL, repo)
    own = dict(out=str(tmp_path / "runs"), name="mine", oracle={"_target_": "rlstitch.oracles.Terminal", "weights": {"clip": 1.0}})
    given = recipe("draft", check=True, sampler={"shift": 3.0}, stop={"_target_": "rlstitch.stops.End"}, **own)
    config = checks.checked(given, "draft")
    told = describe.describe(config)
    assert f"path: {MODEL}@{FIRST}" in told and f"model {MODEL}@{FIRST}: 5 files, " in told and "would be fetched" in told
    assert not any(name.endswith(".safetensors") for name in online.asked)

    online.put(MODEL, repo, SECOND)  # the name stands for another commit by now, but the cache is asked first
    config = checks.checked(recipe("draft", **own), "draft")
    assert config.model["path"] == f"{MODEL}@{FIRST}" and set(online.asked) >= WEIGHTS
    assert "in the hub cache" in describe.describe(config)

    run = tmp_path / "runs" / "mine"  # a run that has a checkpoint
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000002" / "complete.json").write_text("{}")
    (run / "recipe.yaml").write_text(cfg.to_yaml(config))
    for odd in ({"rewards": {"clip": 3}}, {"model": {"path": 3}}):  # which the checks tell
        keep_commits(cfg.structure(cfg.merge(recipe("draft", **own), odd))[0], "draft")
    shutil.rmtree(online.cache / "models--someone--tiny-sd3" / "refs")
    again = checks.checked(recipe("draft", **own), "draft")
    assert again.model["path"] == f"{MODEL}@{FIRST}"
    resumable(again)
    for changes, path in (
        ({"resume": "never"}, MODEL),
        ({"resume": str(run / "checkpoints" / "step-000002")}, f"{MODEL}@{FIRST}"),
        ({"name": "x"}, MODEL),
    ):
        fresh = cfg.structure(recipe("draft", **(own | changes)))[0]
        keep_commits(fresh, "draft")
        assert fresh.model["path"] == path, changes
    with pytest.raises(UserError, match=rf"another recipe \(model.path: {MODEL}@{FIRST} -> {MODEL}@{SECOND}\)"):
        resumable(checks.checked(recipe("draft", **own, model={"path": f"{MODEL}@main"}), "draft"))

    card = parts.pinned(stitch.checked(recipe("stitch_clip", check=True, out=str(tmp_path)), "stitch_clip").model)
    assert card["path"] == f"{MODEL}@{SECOND}"
    steered = steer.checked(recipe("dps", check=True, out=str(tmp_path / "steered")), "dps")
    assert steered.model["path"] == f"{MODEL}@{SECOND}" and f"model {MODEL}@{SECOND}: in the hub cache" in describe.steering(steered)
    engine = SimpleNamespace(rank=1, device="cpu", by_main=lambda own: json.dumps([f"{MODEL}@{FIRST}"]), together=lambda action: action())
    with pytest.raises(UserError, match=f"rank 0 takes {MODEL}@{FIRST} and rank 1 {MODEL}@{SECOND}: name one commit"):
        parts.Parts.of(steered.model, {}, engine=engine)
    monkeypatch.chdir(sd3_dir.parent)
    Path("someone").mkdir(exist_ok=True)
    Path(MODEL).symlink_to(sd3_dir)  # what lies here wins
    assert hub.pinned(MODEL) == MODEL and hub.model_folder(MODEL) == Path(MODEL) and not hub.missing(MODEL, ["vae"])
    Path(MODEL).unlink()


def test_what_keeps_a_model_from_being_fetched_is_one_line(online, repo, monkeypatch, tmp_path):
    def fault(path=MODEL, **options):
        with pytest.raises(UserError) as told:
            hub.fetch(path, directory.needs({"path": path}), **options)
        assert "\n" not in str(told.value)
        return str(told.value)

    assert "no model someone/tiny-sd3 that can be seen from here: look at its spelling" in fault()
    online.put(MODEL, repo)
    assert "has no revision 'v2' at the hub" in fault(f"{MODEL}@v2")
    online.fails[MODEL] = error(errors.GatedRepoError)
    assert "is gated: accept its licence on the model's page at the hub, then run hf auth login" in fault()
    for unanswered in (httpx2.ConnectError("no route to host\nat all"), errors.LocalEntryNotFoundError("cannot be reached")):
        online.fails[MODEL] = unanswered
        assert "try again, or where there is a network, run hf download someone/tiny-sd3 --include" in fault()
    online.fails[MODEL] = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):  # which is the machine's affair
        hub.model_folder(MODEL)
    online.fails.clear()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = fault(f"{MODEL}@v2")
    assert "HF_HUB_OFFLINE" in said and "run hf download someone/tiny-sd3 --revision v2 --include '*.json'" in said
    monkeypatch.setattr(hub, "_libraries_alone", True)  # it was not the user who said so
    folder = hub.model_folder(MODEL)
    assert constants.HF_HUB_OFFLINE and folder.name == FIRST
    monkeypatch.setattr(hub, "_libraries_alone", False)
    said = fault()
    assert "it lacks the weights of transformer, vae, text_encoder, text_encoder_2" in said and "--include 'vae/*.safetensors'" in said
    shutil.rmtree(folder / "vae")  # of what is left when a download is cut
    hub._asked.clear()
    assert "no more than a part of it (it lacks vae/)" in fault()
    assert any("lacks vae/" in fault for fault in part_checks.model_faults({"_target_": "rlstitch.backbones.Diffusers", "path": MODEL}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.model_folder(MODEL) == folder and (folder / "vae" / "config.json").is_file()

    pickled = shutil.copytree(repo, tmp_path / "pickled")
    for file in pickled.rglob("*.safetensors*"):
        file.unlink()
    online.put("someone/pickled", pickled)
    (one,) = part_checks.model_faults({"_target_": "rlstitch.backbones.Diffusers", "path": "someone/pickled"})
    assert "the transformer of someone/pickled" in one and ".bin, which can run code and is not read here" in one
    for odd in ("someone/", "someone/a@", "someone/a b", "so--me/a", "someone/a.git", "a/b/c", "https://somewhere/a/b", "someone/a@../x"):
        with pytest.raises(UserError, match="is not there .* Nor is it a hub id, which is owner/name or owner/name@revision$"):
            hub.model_folder(odd)


def test_a_lora_by_hub_id(online, tmp_path, monkeypatch, capsys):
    lora, name = tmp_path / "lora", "someone/lora-of_mine"
    write_tensors(lora / "sub" / "other.safetensors", {"x": torch.ones(1)})
    write_tensors(lora / "adapter_model.safetensors", {"x": torch.ones(2)})
    (lora / "adapter_config.json").write_text("{}")
    (lora / "model.bin").write_bytes(b"x")
    online.put(name, lora)
    file = adapters.find(name)
    assert file.name == "adapter_model.safetensors" and file.with_name("adapter_config.json").is_file()
    assert online.asked == ["adapter_config.json", "adapter_model.safetensors"] and "of LoRA" in capsys.readouterr().out
    assert adapters.find(f"{name}/sub/other.safetensors@main").parent.name == "sub"
    assert adapters.pinned(name) == f"{name}/adapter_model.safetensors@{FIRST}" and adapters.pinned("") == ""
    assert adapters.pinned([f"{name}/sub/other.safetensors"]) == [f"{name}/sub/other.safetensors@{FIRST}"]
    online.put(name, lora, SECOND)
    assert adapters.pinned(name).endswith(FIRST) and adapters.find(adapters.pinned(name)) == file  # of what is in the cache

    def fault(path):
        with pytest.raises(UserError) as told:
            adapters.find(path)
        assert "\n" not in str(told.value)
        return str(told.value)

    assert "no file third.safetensors: it has adapter_model.safetensors, sub/other.safetensors" in fault(f"{name}/third.safetensors")
    assert "has no revision 'v2' at the hub" in fault(f"{name}@v2")
    assert "the LoRA 'someone/none/a.safetensors' is not here, and the hub has no model someone/none" in fault("someone/none/a.safetensors")
    several = shutil.copytree(lora / "sub", tmp_path / "several")
    write_tensors(several / "one.safetensors", {"x": torch.ones(1)})
    online.put("someone/several", several)
    assert "someone/several holds 2 safetensors files (one.safetensors, other.safetensors): name the LoRA's own" in fault("someone/several")
    (several / "one.safetensors").unlink()
    (several / "other.safetensors").rename(several / "other.bin")
    online.put("someone/pickled", several)
    assert "only other.bin, which can run code and is not read here" in fault("someone/pickled")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapters.find(name) == file
    assert "run hf download someone/new 'a b.safetensors' --revision v1" in fault("someone/new/a b.safetensors@v1")


def test_the_libraries_ask_no_network_and_the_user_may_say_so_of_all(monkeypatch):
    for said, libraries, all_of_it in (("", "1", False), ("1", "1", True), ("0", "0", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", said)
        monkeypatch.setattr(hub, "_libraries_alone", False)
        hub.keep_libraries_offline()
        hub.keep_libraries_offline()  # of a second job in one process
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", os.environ["HF_HUB_OFFLINE"] == "1")  # as the client reads it when it is imported
        assert (os.environ["HF_HUB_OFFLINE"], hub.offline()) == (libraries, all_of_it)


def test_nothing_that_is_fetched_names_code(online, repo):
    index = json.loads((repo / "model_index.json").read_text())
    (repo / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["code", "Words"]}))
    (repo / "tokenizer" / "code.py").write_text("raise SystemExit('imported')")
    online.put(MODEL, repo)
    for ask in (lambda: Diffusers(MODEL), lambda: directory.needs({"path": MODEL})):
        with pytest.raises(UserError, match="takes tokenizer from 'code', and parts are taken from diffusers and transformers alone"):
            ask()
    assert "taken from diffusers" in directory.faults({"path": MODEL})[0][1]


def test_one_process_fetches_and_the_others_wait(online, repo):
    online.put(MODEL, repo)
    hub.model_folder(MODEL)
    online.asked.clear()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (hub.fetch(MODEL, ["vae"]), done.set()))
    with hub._alone(MODEL):
        waiting.start()
        assert not done.wait(0.5) and not online.asked
        online.snapshot_download(
            MODEL, revision=FIRST, allow_patterns=["vae/*model.safetensors"], tqdm_class=downloads.Silent
        )  # the other process
    waiting.join()
    assert done.is_set() and online.asked == ["vae/diffusion_pytorch_model.safetensors"]  # it was not fetched again
