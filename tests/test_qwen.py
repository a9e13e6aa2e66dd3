"""A preference model on Qwen2-VL against transformers' own processor and model, on a small random one."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

from rlstitch.contract import broken, contract
from rlstitch.files import write_tensors
from rlstitch.metrics import to_image
from rlstitch.rewards.qwen import QwenPreference, smart_resize
from rlstitch.types import Batch, UserError

TOKENS = [
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "a",
    "red",
    "cat",
    "rate",
    "user",
    "assistant",
]
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %} <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
ASK = "rate {prompt} <|Reward|>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    words = Tokenizer(models.WordLevel({t: k for k, t in enumerate(TOKENS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", additional_special_tokens=TOKENS[1:7], chat_template=CHAT)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=len(TOKENS) + 1,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=14),
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Dropout(0.05), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    config.save_pretrained(folder)
    new = dict(model.state_dict()) | {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    write_tensors(folder / "new.safetensors", {k: v.clone() for k, v in new.items()})
    old = {k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v.clone() for k, v in new.items()}
    write_tensors(folder / "old.safetensors", old)
    return folder, model, head, fast


def reward_of(folder, file="new.safetensors", **options):
    return QwenPreference(
        str(folder / file), **({"base": str(folder), "instruction": ASK, "dtype": "float32", "pixels": 56 * 84} | options)
    )


def expected(files, image, prompt, pixels):
    """By transformers' processor (PIL) and model: a score."""
    _, model, head, words = files
    given = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)(images=to_image(image), return_tensors="pt")
    count = int(given["image_grid_thw"].prod()) // 4
    text = f"<|im_start|> user <|vision_start|>{'<|image_pad|>' * count}<|vision_end|> rate {prompt} <|Reward|> <|im_end|> <|im_start|> assistant"
    words.add_tokens(["<|Reward|>"], special_tokens=True)
    ids = words(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model.model(
            input_ids=ids, pixel_values=given["pixel_values"], image_grid_thw=given["image_grid_thw"], mm_token_type_ids=(ids == 5).int()
        ).last_hidden_state
        return head(states[0, ids[0].tolist().index(len(TOKENS))])[0], given["pixel_values"]


def test_it_is_transformers_model_on_transformers_pictures(files):
    reward, old = reward_of(files[0]), reward_of(files[0], "old.safetensors")
    generator = torch.Generator().manual_seed(0)
    assert reward.fingerprint() == old.fingerprint()
    for height, width, tolerance in ((56, 84, 1e-5), (64, 64, 0.02), (40, 130, 0.02), (200, 150, 0.02)):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = (nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0] * 255).round() / 255
        wanted, patches = expected(files, image, "a red cat", 56 * 84)
        ours, grid = reward.patches(image)
        assert ours.shape == patches.shape and int(grid.prod()) == len(ours)
        torch.testing.assert_close(ours, patches, atol=1.6 / 255 / 0.26 if tolerance > 1e-4 else 1e-5, rtol=0)  # PIL rounds to grey levels
        with torch.no_grad():
            torch.testing.assert_close(reward.score_one(image, "a red cat"), wanted, atol=tolerance, rtol=0)
    images = torch.rand(2, 3, 60, 60, generator=generator)
    batch = Batch(["a red cat", "a cat"], torch.arange(2), torch.arange(2))
    with torch.no_grad():
        together = reward.score(images, batch)
        assert torch.equal(together, torch.stack([reward.score_one(i, p) for i, p in zip(images, batch.prompts)]))
        assert len(set(together.tolist())) == 2 and not torch.equal(
            reward.score(images, Batch(["a", "a"], batch.seeds, batch.seeds)), together
        )
        assert not torch.equal(reward_of(files[0], output=1).score(images, batch), together)


def test_its_gradient_is_that_of_finite_differences(files):
    reward = reward_of(files[0])
    image = (
        0.4 + 0.2 * torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0)).double()
    )  # away from black and white, where resizing cuts off
    reward.model.double(), reward.head.double()
    reward.dtype = torch.float64
    reward._read = lambda patches, grid, ids: reward.head(
        reward.model(input_ids=ids, pixel_values=patches, image_grid_thw=grid[None], mm_token_type_ids=(ids == 5).int()).last_hidden_state[
            0, (ids[0] == reward.token).nonzero()[-1, 0]
        ]
    )[0]
    image.requires_grad_(True)
    reward.score_one(image, "a cat").backward()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():  # a step that is large beside the float32 of its norms
        slope = (reward.score_one(image + 3e-3 * direction, "a cat") - reward.score_one(image - 3e-3 * direction, "a cat")) / 6e-3
    assert float((image.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02)


def test_what_does_not_fit_is_one_line(files, tmp_path):
    folder = files[0]
    for options, message in (
        ({"instruction": "rate {prompt}"}, "must hold {prompt} once and <|Reward|> once; it holds them 1 and 0 times"),
        ({"token": "<|Other|>", "instruction": "rate {prompt} <|Other|> <|Reward|>"}, None),
        ({"output": 2}, "'output' is 2, and the head of .* has 2 outputs"),
        ({"base": str(tmp_path / "none")}, "none"),
    ):
        if message is None:
            assert reward_of(folder, **options).token == len(TOKENS)
            continue
        with pytest.raises(UserError, match=message):
            reward_of(folder, **options)
    write_tensors(tmp_path / "plain.safetensors", {"model.embed_tokens.weight": torch.ones(3, 2)})
    with pytest.raises(UserError, match="there is no rm_head"):
        QwenPreference(str(tmp_path / "plain.safetensors"), base=str(folder), instruction=ASK)
    (tmp_path / "ask.txt").write_text(ASK)
    assert reward_of(folder, instruction=str(tmp_path / "ask.txt")).instruction == ASK
    for height, width in ((512, 512), (100, 9000), (30, 40), (1000, 777), (448, 448)):
        assert smart_resize(height, width, 28, 256 * 784) == theirs(height, width, 28, 256 * 784, 256 * 784)
    with pytest.raises(UserError, match="too long for Qwen2-VL"):
        smart_resize(10, 3000, 28, 256 * 784)


def test_it_keeps_the_contract(files):
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    assert not broken(contract("qwen", reward_of(files[0]), images, ["a red cat", "a cat", "red"]))
