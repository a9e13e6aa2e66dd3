"""LoRA from elsewhere: every kind of file gives the velocity that its own library gives, what is none is refused by name, before weights load."""

import copy
import json
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rlstitch import checks, part_checks
from rlstitch.backbones import Diffusers, directory, loras, shared
from rlstitch.policy import CURRENT, EMA, INIT, REFERENCE, Policy
from rlstitch.types import UserError, noise_like
from tests.pipelines import WRITERS
from tests.test_architectures import PROMPTS, stock

FILE = "pytorch_lora_weights.safetensors"
PATTERNS = dict(  # ranks, alphas and square roots that a reader can get wrong
    r=4, lora_alpha=6, rank_pattern={"transformer_blocks.1.attn.to_q": 2}, alpha_pattern={"attn.to_k": 1, "transformer_blocks.1.attn.to_q": 5},
    use_rslora=True, target_modules=["to_q", "to_k", "attn.to_out.0"], init_lora_weights=False,
)  # fmt: skip


class World:
    """A tiny model, its stock pipeline, and one batch to ask both about."""

    def __init__(self, folder):
        self.path = str(folder)
        self.backbone = self.fresh()
        self.pipeline, self.text = stock(self.backbone), self.backbone.encode_prompts(PROMPTS)
        self.base = self.velocity()

    def fresh(self, **options):
        return Diffusers(self.path, max_sequence_length=48, image_size=16, **options)

    @torch.no_grad()
    def velocity(self, transformer=None, backbone=None):
        """Of a transformer, or of a backbone."""
        backbone = backbone or self.backbone
        z, sigma = noise_like(backbone.latent_shape, torch.tensor([1, 2])), torch.tensor([0.3, 0.9])
        if transformer is None:
            return backbone.velocity(z, sigma, self.text)
        return backbone.arch.output(transformer(**backbone.arch.inputs(transformer, z, sigma, self.text, backbone.embedded)), z)

    def stock(self, lora):
        """What the stock pipeline makes of a LoRA."""
        self.pipeline.load_lora_weights(lora)
        try:
            return self.velocity(self.pipeline.transformer)
        finally:
            self.pipeline.unload_lora_weights()

    def merged(self, layers, scale):
        transformer = copy.deepcopy(self.pipeline.transformer)
        with torch.no_grad():
            for name, (a, b) in layers.items():
                transformer.get_submodule(name).weight += scale * b @ a
        return self.velocity(transformer)

    def loaded(self, path):
        assert not checks.lora_faults("lora", str(path), {"_target_": "rlstitch.backbones.Diffusers", "path": self.path})
        backbone = self.fresh()
        backbone.load_lora(path)
        own = self.velocity(backbone=backbone)
        assert (own - self.base).abs().max() > 1e-3 and not any(p.requires_grad for p in backbone.transformer.parameters())
        return own


@pytest.fixture(scope="module", params=["sd3", "flux"])
def world(request, tmp_path_factory):
    return World(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


def saved(path, tensors, header=None):
    save_file(
        {n: t.clone() for n, t in tensors.items()}, path, metadata=None if header is None else {"lora_adapter_metadata": json.dumps(header)}
    )


def trained_with_peft(world, folder, **changes):
    """PEFT's own files, and the velocity of the model that wrote them."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(copy.deepcopy(world.pipeline.transformer), LoraConfig(**(PATTERNS | changes)))
    wrapped.save_pretrained(folder)
    return world.velocity(wrapped.base_model.model)


def flat(layers, prefix, alpha=3.0):
    """As kohya's scripts name layers {name: (A, B)}; alpha is a whole number in some of their files."""
    out = {}
    for name, (a, b) in layers.items():
        key = prefix + name.replace(".", "_")
        out |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    return out


def random_layers(backbone, *ends, rank=2):
    g = torch.Generator().manual_seed(7)
    return {
        n: (0.3 * torch.randn(rank, m.in_features, generator=g), 0.3 * torch.randn(m.out_features, rank, generator=g))
        for n, m in backbone.transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith(ends)
    }


def test_files_of_every_trainer_give_what_their_library_gives(world, tmp_path):
    backbone, arch, expected = world.backbone, world.backbone.arch, {}
    expected["peft"] = trained_with_peft(world, tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    inner = {n.removeprefix("base_model.model."): t for n, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    # diffusers' own, with the header that says the scale, in a run folder, under a name of its own
    header = {k: v for k, v in settings.items() if k in PATTERNS and k != "init_lora_weights"}
    (tmp_path / "run").mkdir()
    arch.PIPELINE.save_lora_weights(
        tmp_path / "run" / "lora", transformer_lora_layers=inner, weight_name="mine.safetensors", transformer_lora_adapter_metadata=header
    )
    torch.testing.assert_close(world.stock(tmp_path / "run" / "lora"), expected["peft"], atol=1e-5, rtol=1e-5)
    expected["run"] = expected["run/lora"] = expected["run/lora/mine.safetensors"] = expected["peft"]
    header["target_modules"] = r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_out\.0)"  # a pattern
    arch.PIPELINE.save_lora_weights(tmp_path / "pattern", transformer_lora_layers=inner, transformer_lora_adapter_metadata=header)
    expected["pattern"] = expected["peft"]
    # without a header: alpha is the rank
    arch.PIPELINE.save_lora_weights(tmp_path / "plain", transformer_lora_layers=inner)
    expected["plain"] = expected["bare.safetensors"] = world.stock(tmp_path / "plain")
    before = lambda n: "_orig_mod." if "to_q" in n else "model.diffusion_model."  # noqa: E731  compiled; as whole checkpoints have it
    saved(tmp_path / "bare.safetensors", {(before(n) + n).replace(".weight", ".default.weight"): t for n, t in inner.items()})
    # flattened names of kohya and of LyCORIS
    layers = random_layers(backbone, "to_q", "to_add_out", "proj_out")
    lycoris = {n: two for n, two in layers.items() if n.endswith("to_q")}
    saved(
        tmp_path / "kohya.safetensors",
        flat({n: two for n, two in layers.items() if n not in lycoris}, "lora_unet_", 3) | flat(lycoris, "lycoris_", 3),
    )
    expected["kohya.safetensors"] = world.merged(layers, 1.5)
    if arch.PIPELINE.__name__ == "FluxPipeline":
        attention = random_layers(backbone, "to_q", "to_add_out")
        saved(tmp_path / "mixture.safetensors", flat(attention, "lora_transformer_"))
        fused = {n.replace("transformer_blocks.", "double_blocks."): two for n, two in layers.items() if "to_add_out" in n}
        fused = {n.replace("attn.to_add_out", "txt_attn_proj"): two for n, two in fused.items()}
        for k in range(2):
            a, b = layers[f"transformer_blocks.{k}.attn.to_q"]
            fused[f"double_blocks.{k}.img_attn_qkv"] = (a, torch.cat([b, 2 * b, -b]))
        saved(tmp_path / "fused.safetensors", flat(fused, "lora_unet_"))
        lora = {k: torch.cat([layers[f"transformer_blocks.{k}.attn.to_q"][1]] * 3) for k in range(2)}
        xlabs = {f"double_blocks.{k}.processor.qkv_lora1.up.weight": b for k, b in lora.items()}
        xlabs |= {f"double_blocks.{k}.processor.qkv_lora1.down.weight": layers[f"transformer_blocks.{k}.attn.to_q"][0] for k in range(2)}
        saved(tmp_path / "xlabs.safetensors", xlabs)
        for name in ("mixture", "fused", "xlabs"):
            expected[f"{name}.safetensors"] = world.stock(tmp_path / f"{name}.safetensors")
    for name, wanted in expected.items():
        torch.testing.assert_close(world.loaded(tmp_path / name), wanted, atol=1e-5, rtol=1e-5, msg=name)


FUSED = {  # names of a model's first code: (its layer, those of diffusers that it is, in its rows' order)
    "zimage": [("layers.{}.attention.qkv", ["layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v"]), ("layers.{}.attention.out", ["layers.{}.attention.to_out.0"])],
    "flux2": [("double_blocks.{}.img_attn.qkv", [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"]), ("single_blocks.{}.linear1", ["single_transformer_blocks.{}.attn.to_qkv_mlp_proj"])],
    "flux": [("double_blocks.{}.txt_attn.qkv", [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"]), ("double_blocks.{}.img_attn.proj", ["transformer_blocks.{}.attn.to_out.0"])],
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_names_of_a_models_first_code_with_dots(name, tmp_path):
    """Layers that are one there and several here, whatever stands before the names and whatever the halves are called."""
    arch = shared.architecture(WRITERS[name](tmp_path / "model"))
    there, fused, layers, g = loras.linears(directory.skeleton(tmp_path / "model")), {}, {}, torch.Generator().manual_seed(5)
    for layer, own in FUSED[name]:
        a = torch.randn(2, there[own[0].format(1)][1], generator=g)
        bs = [torch.randn(there[n.format(1)][0], 2, generator=g) for n in own]
        fused[layer.format(1)] = (a, torch.cat(bs))
        layers |= {n.format(1): 1.5 * b @ a for n, b in zip(own, bs)}
    for before, halves in (
        ("diffusion_model.", ("lora_A", "lora_B")),
        ("", ("lora_down", "lora_up")),
        ("lora_unet_", ("lora_down", "lora_up")),
    ):
        names = {n: before + (n.replace(".", "_") if before.endswith("_") else n) for n in fused}
        tensors = {f"{names[n]}.{half}.weight": t for n, two in fused.items() for half, t in zip(halves, two)}
        saved(tmp_path / "x.safetensors", tensors | {f"{names[n]}.alpha": torch.tensor(3.0) for n in fused})
        found, _ = loras.fitting(tmp_path / "x.safetensors", arch, there, "model")
        assert found.keys() == layers.keys(), before
        for n, (a, b) in found.items():
            torch.testing.assert_close(b @ a, layers[n])


def faulty(folder, inner):
    """What nobody should be given silently: file's content, header or None, adapter_config or None, what is told."""
    some = next(iter(inner))
    layer, plain = some.partition(".lora_")[0], {f"transformer.{n}": t for n, t in inner.items()}
    peft_names, whole = {f"base_model.model.{n}": t for n, t in inner.items()}, {"r": 4, "lora_alpha": 8, "peft_type": "LORA"}
    header = lambda **more: {f"transformer.{k}": v for k, v in ({"r": 4, "lora_alpha": 8} | more).items()}  # noqa: E731
    one = torch.ones(2)
    return [
        (plain | {f"transformer.{layer}.lora_magnitude_vector": one}, None, None, "DoRA"),
        (flat({layer: (one[None], one[:, None])}, "lora_unet_") | {"lora_unet_x.dora_scale": one}, None, None, "DoRA"),
        ({f"transformer.{layer}.lokr_w1": one}, None, None, "LoKr"),
        ({"lora_unet_x.hada_w1_a": one}, None, None, "LoHa"),
        (plain | {f"transformer.{layer}.lora_B.bias": one}, None, None, "lora_bias"),
        (plain | {f"transformer.{layer}.diff_b": one}, None, None, "diff"),
        (plain | {"transformer.norm.weight": one}, None, None, "transformer.norm.weight"),
        (plain | {f"transformer.{some}": inner[some] * float("nan")}, None, None, "1 of .* hold NaN or Inf"),
        (plain | {f"transformer.{layer}.alpha": one}, None, None, "alpha holds 2 numbers"),
        (plain | {"transformer.none.alpha": one[:1]}, None, None, "scales are of no layer, e.g. transformer.none.alpha"),
        ({n: t for n, t in plain.items() if n != f"transformer.{some}"}, None, None, "lack A or B"),
        (plain | {f"transformer.{some}": inner[some].to(torch.int8)}, None, None, "no floating-point numbers"),
        (plain | {f"transformer.{layer}.alpha": one[:1]}, header(), None, "says its scale twice"),
        (plain, header(use_dora=True), None, "use_dora"),
        (plain, header(r=3), None, "has rank 4, which says 3"),
        (plain, header(lora_alpha="much"), None, "'lora_alpha' must be a number"),
        (plain, {"transformer.r": 4}, None, "does not say lora_alpha"),
        (plain, header(rank_pattern={".*": 4, "(": 3}), None, "cannot be read"),
        (plain | {f"transformer.{layer}.alpha": torch.tensor(3e38), f"transformer.{layer}.lora_B.weight": 99 * inner[f"{layer}.lora_B.weight"]}, None, None, "hold NaN or Inf"),
        (plain, header(init_lora_weights="pissa"), None, "init_lora_weights pissa"),
        (plain, header(target_modules="(to_q"), None, "cannot be read"),
        (plain, header(target_modules=["to_v", "to_q", "to_k", "to_out.0"]), None, "layers differ, e.g. .*to_v"),
        (plain, [1], None, "holds list, not names"),
        (peft_names, None, None, "no adapter_config.json beside it"),
        (peft_names, None, whole | {"peft_type": "LOHA"}, "says LOHA"),
        (peft_names, None, {"r": 4}, "does not say lora_alpha"),
        ({f"unet.mid_block.{n}": t for n, t in inner.items()}, None, None, "none of a .*Transformer2DModel's, e.g. unet.mid_block"),
        ({f"transformer.{n}".replace("blocks.0", "blocks.7"): t for n, t in inner.items()}, None, None, "another architecture"),
        ({f"text_encoder.{n}": t for n, t in inner.items()}, None, None, "for text encoders alone"),
        ({n: t[:0] if "_A" in n else t[:, :0] for n, t in plain.items()}, None, None, "lack A or B, or their ranks"),
        ({n: torch.zeros_like(t) for n, t in plain.items()}, None, None, "tensors are zero"),
        ({"x": one}, None, None, "is no LoRA: 1 of its 1 tensors"),
    ]  # fmt: skip


def test_what_is_no_plain_lora_of_this_model_is_refused_by_name_before_weights_load(world, tmp_path, capsys):
    backbone = world.fresh()
    trained_with_peft(world, tmp_path / "peft", rank_pattern={}, use_rslora=False)
    inner = {n.removeprefix("base_model.model."): t for n, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": world.path}
    for number, (tensors, header, beside, told) in enumerate(faulty(tmp_path, inner)):
        folder = tmp_path / str(number)
        folder.mkdir()
        saved(folder / "x.safetensors", tensors, header)
        if beside is not None:
            (folder / "adapter_config.json").write_text(json.dumps(beside))
        (fault,) = checks.lora_faults("lora", str(folder), node)
        assert "\n" not in fault and fault.startswith("'lora': ")
        with pytest.raises(UserError, match=told):
            raise UserError(fault)
        with pytest.raises(UserError) as caught:
            backbone.load_lora(folder)
        assert fault == f"'lora': {caught.value}" and not hasattr(backbone.transformer, "peft_config"), "nothing is half on"
    # folders and files
    for name, told in (
        (".", "holds no LoRA"),
        ("0/none", "is not there"),
        ("two", "holds 2 safetensors files"),
        ("pickle", "run code"),
        ("run", "written when it ends"),
    ):
        (tmp_path / name).mkdir(exist_ok=True) if "none" not in name else None
        (tmp_path / "pickle" / "x.bin").write_text("") if name == "pickle" else None
        (tmp_path / "run" / "recipe.yaml").write_text("") if name == "run" else None
        for k in "ab" * (name == "two"):
            saved(tmp_path / "two" / f"{k}.safetensors", inner)
        (fault,) = checks.lora_faults("lora", str(tmp_path / name), node)
        assert told in fault
    # beside a part for text encoders the rest is taken, and that is said
    text = {f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    saved(tmp_path / "text.safetensors", {f"transformer.{n}": t for n, t in inner.items()} | text)
    backbone.load_lora(tmp_path / "text.safetensors")
    assert "has 2 tensors for text encoders, which stay as they are" in capsys.readouterr().out


def test_a_policy_starts_from_a_lora_of_other_rank_and_targets_and_is_exported_as_one(world, tmp_path):
    """Its sets and the reference begin as the model with it, bit for bit; the reference stays so; what is exported is the policy, in the stock pipeline, too."""
    layers = random_layers(world.backbone, "to_q", "proj_out", "norm_out.linear", rank=3)
    saved(tmp_path / "kohya.safetensors", flat(layers, "lora_unet_", 1.5))
    backbone = world.fresh()
    prefix = backbone.make_prefix(2)
    init = backbone.load_lora(tmp_path / "kohya.safetensors", INIT)
    policy = Policy(backbone.transformer, rank=2, alpha=8.0, targets=backbone.lora_targets, seed=0, ema_decay=0.5, old=True, init=init)
    start = world.velocity(backbone=backbone)
    torch.testing.assert_close(start, world.merged(layers, 0.5), atol=1e-5, rtol=1e-5)
    for name in (EMA, REFERENCE, "old", CURRENT):
        with policy.use(name):
            assert torch.equal(world.velocity(backbone=backbone), start), name
    assert {n for n, p in backbone.transformer.named_parameters() if p.requires_grad} == {n for n, _ in policy.named_parameters()}
    assert not any(f".{INIT}." in n for n in policy.state_dict()) and prefix.fingerprint() == world.backbone.make_prefix(2).fingerprint()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trained = world.velocity(backbone=backbone)
    with policy.use(REFERENCE):
        assert torch.equal(world.velocity(backbone=backbone), start) and (trained - start).abs().max() > 1e-3
    policy.export(tmp_path / "lora", CURRENT)
    for velocity in (world.stock(tmp_path / "lora"), world.stock(load_file(tmp_path / "lora" / FILE)), world.loaded(tmp_path / "lora")):
        torch.testing.assert_close(velocity, trained, atol=1e-5, rtol=1e-5)
    policy.export(tmp_path / "start", EMA)  # which has not moved
    torch.testing.assert_close(world.stock(tmp_path / "start"), start, atol=1e-5, rtol=1e-5)


def test_a_merged_model_is_the_base_everywhere(world, tmp_path):
    layers, more = random_layers(world.backbone, "to_q", "proj_out"), random_layers(world.backbone, "to_q", "to_k", rank=3)
    saved(tmp_path / "a.safetensors", flat(layers, "lora_unet_", 3.0))
    saved(tmp_path / "b.safetensors", flat(more, "lora_unet_", 3.0))
    paths = [str(tmp_path / f"{k}.safetensors") for k in "ab"]
    one, both = world.fresh(merge=paths[0]), world.fresh(merge=paths)
    torch.testing.assert_close(world.velocity(backbone=one), world.merged(layers, 1.5), atol=1e-5, rtol=1e-5)
    one.load_lora(paths[1])
    torch.testing.assert_close(world.velocity(backbone=both), world.velocity(backbone=one), atol=1e-5, rtol=1e-5)
    prints = {b.make_prefix(1).fingerprint() for b in (world.backbone, world.fresh(merge=paths[0]), both)}
    assert len(prints) == 3 and not any("lora" in n for n, _ in both.transformer.named_parameters())
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": world.path}
    assert not part_checks.model_faults(node | {"merge": paths})
    for wrong in (["", paths[0]], [], 3, "", {"a": 1}):
        (fault,) = checks.part_faults(SimpleNamespace(model=node | {"merge": wrong}, rewards={}))
        assert fault.startswith("'model.merge' must")
    assert "is not there" in part_checks.model_faults(node | {"merge": [paths[0], "none"]})[0]
    assert "(int8) take nothing in" in " ".join(part_checks.model_faults(node | {"merge": paths, "quantise": "int8"}))
    with pytest.raises(UserError, match="take nothing in"):
        world.fresh(merge=paths, quantise="int8")


def test_targets_that_leave_a_block_out_or_hit_nothing_are_told(world):
    """The architecture's own are sound; of a recipe's, each must be of linears alone, and every block of every list have one."""
    node = {"_target_": "rlstitch.backbones.Diffusers", "path": world.path}
    lists = {group: len(getattr(world.backbone.transformer, group)) for group in world.backbone.arch.LISTS}
    first, blocks = next(iter(lists)), sum(lists.values())
    cases = {
        (): "",
        ("to_q",): "",
        ("attn.to_k", f"{first}.*.attn.to_add_out"): "",
        (f"{first}.0.attn.to_q",): f"{blocks - 1} of {blocks} blocks would have no LoRA and learn nothing: {first}.1, ",
        (f"{first}.*",): f"{lists.get('single_transformer_blocks')} of {blocks} blocks .*: single_transformer_blocks.0,"
        if len(lists) > 1
        else "",
        ("to_q", "to_qq"): "'to_qq' is the end of no linear's name .*did you mean 'to_q'",
        ("o_q",): "'o_q' is the end of no linear's name",
        ("attn",): "'attn' is the end of no linear's name",
    }
    if len(lists) == 1:
        cases["to_q", "proj"] = "'proj' is also pos_embed.proj, which is no linear"
    for targets, told in cases.items():
        faults = checks.target_faults(list(targets), node)
        assert (len(faults) == 1 and re.search(f"^'lora.targets': .*{told}", faults[0])) if told else not faults, (targets, faults)
    policy = Policy(
        (backbone := world.fresh()).transformer, rank=1, alpha=1.0, targets=backbone.targets(["to_k", f"{first}.*.to_add_out"]), seed=0, ema_decay=0
    )  # fmt: skip
    on = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in policy.named_parameters()}
    assert on == {"to_k", "to_add_out"} and len(policy.layers) == blocks + lists[first]
