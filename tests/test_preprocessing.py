"""What a reward does to pictures, against the image processors of transformers (PIL) and torchvision's arithmetic by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rlstitch.rewards import preprocessing
from rlstitch.rewards.clip import ClipReward
from rlstitch.types import UserError
from tests.conftest import write_clip

SIZES = [
    (832, 1216), (1216, 832), (1024, 1024), (512, 512), (640, 480), (480, 641), (333, 777), (777, 333), (225, 224), (224, 225), (224, 224), (223, 224),
    (226, 300), (64, 64), (64, 97), (97, 64), (33, 50), (128, 131), (300, 227), (1023, 257),
]  # fmt: skip
GREY = 1 / 255 / 0.26  # one grey level after normalisation


def picture(height, width, seed=0):
    """Smooth structure with sharp edges and some noise, uint8 [3, H, W]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 7, 9, generator=g), (height, width), mode="bilinear")[0]
    coarse[:, height // 3 : height // 2, width // 4 : width // 2] = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1)
    return ((coarse + 0.05 * torch.randn(3, height, width, generator=g)).clamp(0, 1) * 255).round().byte()


def stock(processor, image):
    return torch.tensor(np.array(processor(Image.fromarray(image.permute(1, 2, 0).numpy()))["pixel_values"][0]))


def ours(folder, image, side, resize="auto"):
    return preprocessing.read(folder, side, resize)(image[None].float() / 255)[0]


@pytest.mark.parametrize("height,width", SIZES)
def test_clip_is_the_processors_to_the_pixel(tmp_path, height, width):
    """Tolerance: PIL rounds to grey levels after each pass, so at most 1.5 levels at any pixel and .5 in the mean; where Pillow 13 takes the
    vertical pass first, in very tall pictures, what bicubic overshoots at sharp edges is cut off in another order: 6.5 levels there."""
    processor, image = CLIPImageProcessorPil(), picture(height, width)
    processor.save_pretrained(tmp_path)
    expected, found = stock(processor, image), ours(tmp_path, image, 224)
    assert found.shape == expected.shape == (3, 224, 224)
    assert (found - expected).abs().mean() < 0.5 * GREY
    assert (found - expected).abs().max() < (6.5 if height > 2 * width else 1.5) * GREY


FILES = {
    "squash": CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False),
    "resize then crop": CLIPImageProcessorPil(size={"shortest_edge": 61}, crop_size={"height": 48, "width": 48}),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 48, "width": 48}),
    "crop beyond the picture": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 48, "width": 48}),
    "no normalising": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_normalize=False),
    "no rescaling": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_rescale=False, image_mean=[100.0, 90.0, 80.0], image_std=[60.0] * 3),
    "another scale": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    "bilinear": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, resample=2),
    "nearest": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, resample=0),
    "siglip": SiglipImageProcessorPil(size={"height": 48, "width": 48}),
    "vit": ViTImageProcessorPil(size={"height": 48, "width": 48}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("nested", [False, True])
def test_the_file_is_read_as_it_says(tmp_path, name, nested):
    processor, image = FILES[name], picture(57, 74)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    if nested:  # as transformers 5 writes a whole processor
        (tmp_path / "processor_config.json").write_text(
            json.dumps({"processor_class": "CLIPProcessor", "image_processor": json.loads(file.read_text())})
        )
        file.write_text(json.dumps({"image_mean": [0.0] * 3, "image_std": [9.0] * 3}))  # the nested one comes first, as in transformers
    expected, found = stock(processor, image), ours(tmp_path, image, 48)
    level = float(expected.max() - expected.min()) / 255
    assert (found - expected).abs().max() < 2 * level and (found - expected).abs().mean() < 0.6 * level


def test_old_files_read_alike(tmp_path):
    """Numbers for sizes, the extractor's old name, keys that were not written then."""
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    new = preprocessing.read(tmp_path, 48)
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    old = {k: said[k] for k in ("do_resize", "do_center_crop", "do_normalize", "image_mean", "image_std", "resample")}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(old | {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 48})
    )
    assert preprocessing.read(tmp_path, 48) == new
    said, stock = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 48, "crop_size": 48}, CLIPImageProcessorPil()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))  # which leaves CLIP's own
    found = preprocessing.read(tmp_path, 48)
    assert list(found.mean) == pytest.approx(stock.image_mean) and list(found.std) == pytest.approx(stock.image_std)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "ViTFeatureExtractor", "size": 48}))
    assert preprocessing.read(tmp_path, 48).edge == ("exact", 48, 48) and preprocessing.read(tmp_path, 48).filter == "bilinear"


def test_the_long_side_is_cut_by_clip_and_rounded_by_hps():
    assert preprocessing.stated("shortest_crop", 224).target(832, 1216) == (224, 327)  # 327.38
    assert preprocessing.stated("shortest_crop", 224).target(1000, 600) == (373, 224)  # 373.33
    assert preprocessing.stated("shortest_crop", 224).target(600, 1019) == (224, 380)  # 380.43
    assert preprocessing.stated("shortest_crop", 100).target(300, 599) == (100, 199)  # 199.67
    assert preprocessing.stated("longest_pad", 100).target(300, 599) == (50, 100)  # 50.08
    assert preprocessing.stated("longest_pad", 100).target(599, 297) == (100, 50)  # 49.58
    padded = preprocessing.stated("longest_pad", 8)(torch.ones(1, 3, 5, 8))[0, 0]
    assert padded.sum(1).tolist() == [0, 8, 8, 8, 8, 8, 0, 0]  # of three black rows one stands before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(resample=1), "resample 1"),
        (dict(size={"longest_edge": 16}), "longest_edge"),
        (dict(size={"shortest_edge": -3}), "shortest_edge"),
        (dict(crop_size={"height": 20, "width": 16}), "crops to 16 x 20 pixels, and the tower takes 16 x 16"),
        (dict(do_resize="yes"), "do_resize 'yes'"),
        (dict(do_pad=True), "do_pad"),
        (dict(image_mean=[0.5, 0.5]), "image_mean"),
        (dict(image_std=[0.5, 0.0, 0.5]), "image_std 0"),
        (dict(image_processor_type="BlipImageProcessor"), "BlipImageProcessor"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(clip_dir, tmp_path, change, why):
    said = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"preprocessor_config.json .*{why}"):
        preprocessing.read(tmp_path, 16)


def test_a_reward_scores_by_its_file_unless_the_recipe_says_otherwise(tmp_path):
    folder = write_clip(tmp_path / "clip")
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"height": 16, "width": 16}, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.3] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    image = picture(24, 40)[None].float() / 255
    auto, squash, crop = (ClipReward(str(folder), **k).patches(image) for k in ({}, {"resize": "squash"}, {"resize": "shortest_crop"}))
    assert torch.equal(auto, squash) and not torch.allclose(auto, crop)
    image.requires_grad_(True)
    assert torch.autograd.grad(ClipReward(str(folder)).patches(image).sum(), image)[0].abs().sum() > 0
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"shortest_edge": 16}}))
    with pytest.raises(UserError, match="brings pictures of 40 x 24 to 26 x 16, and its tower takes 16 x 16"):
        ClipReward(str(folder)).patches(image)
