"""GenEval's six tasks (arXiv:2310.11513) without mmcv: an instance detector of transformers, CLIP for colours, and the rules over the facts in each prompt's row.

The rules and thresholds are the suite's own. Its detector is Mask2Former with Swin-S from mmdet; here it is the same architecture with its authors' weights, or Grounding
DINO, so that figures differ a little from published ones: compare within one detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoProcessor, Mask2FormerForUniversalSegmentation

from rlstitch import hub
from rlstitch.files import read_json
from rlstitch.metrics import to_image
from rlstitch.ranges import Count, DeviceName, Share, Text
from rlstitch.rewards.clip import ClipReward
from rlstitch.types import Batch, UserError
from rlstitch.weights import load_strictly, settled

WHAT = "the detector"
PATH = "facebook/mask2former-swin-small-coco-instance"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
NAMES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "television": "tv",
}  # the suite's names and COCO's
GREY = (0x99, 0x99, 0x99)  # what stands around an object whose colour is asked
RELATIONS = ("left of", "right of", "above", "below")


@dataclass
class Found:
    """An object: (left, top, right, bottom) in pixels, its confidence, and where it is [H, W], bool, if the detector tells."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: Tensor | None = None


Objects = dict[str, list[Found]]  # by the suite's class, the most confident first


def relations(a: Found, b: Found, slack: float = 0.1) -> set[str]:
    """Where a is from b, as the suite has it: the offset of their centres, less `slack` of both their sides, against the distance."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = (_centred(f.box) for f in (a, b))
    offset = torch.tensor([ax - bx, ay - by], dtype=torch.float64)
    left = (offset.abs() - slack * torch.tensor([aw + bw, ah + bh], dtype=torch.float64)).clamp(min=0) * offset.sign()
    if bool((left.abs() < 1e-3).all()):
        return set()
    dx, dy = (left / offset.norm()).tolist()
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, true in zip(RELATIONS, holds) if true}


def _centred(box: Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    return (x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0), abs(y1 - y0)


def said(wanted: dict[str, Any]) -> dict[str, Any]:
    """An object that a row asks for, without the keys that say nothing: tables fill them in for objects that have no colour or no place."""
    return {k: v for k, v in wanted.items() if v is not None}


def unmet(objects: Objects, row: dict[str, Any], colours: Callable[[list[Found], str], list[str]], slack: float = 0.1) -> list[str]:
    """What a row of the suite's metadata asks for and a picture with these objects does not show; none where it is correct. colours: of some objects of a class."""
    faults: list[str] = []
    groups: list[list[Found] | None] = []
    for wanted in map(said, row.get("include") or []):
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, [])[:count]
        own = [f"{len(found)} of {count} {name}"] * (len(found) < count)
        if not own and "color" in wanted and colours(found, name).count(wanted["color"]) < count:
            own.append(f"{name} not {wanted['color']}")
        if not own and "position" in wanted:
            relation, target = wanted["position"]
            others = groups[target]
            if others is None or not all(relation in relations(a, b, slack) for a in found for b in others):
                own.append(f"{name} not {relation} its target")
        groups.append(None if own else found)
        faults += own
    return faults + [
        f"{w['class']} more than {w['count'] - 1}" for w in row.get("exclude") or [] if len(objects.get(w["class"], [])) >= w["count"]
    ]


class Mask2Former:
    """Instances by Mask2Former of transformers, put together from its queries as mmdet does for the suite: the 100 best (query, class) pairs, each scored by its class and by
    how sure its mask is."""

    def __init__(self, path: str, device: torch.device):
        folder = hub.fetch(path, [""], None, WHAT)
        self.model = settled(load_strictly(Mask2FormerForUniversalSegmentation, folder, WHAT), device)
        self.processor, self.device = AutoImageProcessor.from_pretrained(folder), device
        self.labels = [self.model.config.id2label[k] for k in range(len(self.model.config.id2label))]

    @torch.no_grad()
    def __call__(self, picture: Image.Image, names: Iterable[str]) -> Objects:
        """names: the classes that are asked about."""
        given = self.processor(images=picture, return_tensors="pt").to(self.device)
        out = self.model(pixel_values=given["pixel_values"], pixel_mask=given.get("pixel_mask"))
        seen = given["pixel_mask"][0] if "pixel_mask" in given else torch.ones(given["pixel_values"].shape[-2:])
        inner = (int(seen.any(1).sum()), int(seen.any(0).sum()))  # without what it was padded by
        masks = F.interpolate(out.masks_queries_logits, seen.shape, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
        masks = F.interpolate(masks, picture.size[::-1], mode="bilinear", align_corners=False)[0]
        return self.put_together(out.class_queries_logits[0], masks, {name: self.labels.index(NAMES.get(name, name)) for name in names})

    def put_together(self, classes: Tensor, masks: Tensor, places: dict[str, int], best: int = 100) -> Objects:
        """classes [Q, C + 1] and masks [Q, H, W], both logits -> the objects of the classes at `places`."""
        scores = classes.softmax(-1)[:, :-1]
        value, index = scores.flatten().topk(min(best, scores.numel()))
        found: Objects = {name: [] for name in places}
        names = {place: name for name, place in places.items()}
        for score, at in zip(value.tolist(), index.tolist()):
            query, place = divmod(at, scores.shape[1])
            mask = masks[query] > 0
            if place not in names or not bool(mask.any()):
                continue
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            sure = float(masks[query].sigmoid()[mask].sum() / (mask.sum() + 1e-6))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found[names[place]].append(Found(box, score * sure, mask.cpu()))
        return {name: sorted(own, key=lambda f: -f.confidence) for name, own in found.items()}


class GroundingDino:
    """Boxes by Grounding DINO of transformers, asked for the classes by name; it gives no masks."""

    def __init__(self, path: str, device: torch.device):
        folder = hub.fetch(path, [""], None, WHAT)
        self.model = settled(load_strictly(AutoModelForZeroShotObjectDetection, folder, WHAT), device)
        self.processor, self.device = AutoProcessor.from_pretrained(folder), device

    @torch.no_grad()
    def __call__(self, picture: Image.Image, names: Iterable[str]) -> Objects:
        found: Objects = {}
        for name in names:  # one at a time: of several phrases it mixes the names up
            given = self.processor(images=picture, text=f"{name}.", return_tensors="pt").to(self.device)
            out = self.model(**given)
            told = self.processor.post_process_grounded_object_detection(
                out, given.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[picture.size[::-1]]
            )[0]
            rows = zip(told["boxes"].tolist(), told["scores"].tolist())
            found[name] = sorted((Found(tuple(box), score) for box, score in rows), key=lambda f: -f.confidence)
        return found


DETECTORS = {"mask2former": Mask2Former, "grounding_dino": GroundingDino}


class GenEval:
    """1 where a picture shows all that its prompt's row asks for (`include`, `exclude`, `tag` of GenEval's metadata), else 0; NaN never. No gradient.

    detector: `mask2former` (path: facebook/mask2former-swin-small-coco-instance) or `grounding_dino` (IDEA-Research/grounding-dino-base, whose confidences are lower: give
    both thresholds). clip: the CLIP that tells colours. As a judge it reports every task, and their mean as the suite's score.
    """

    differentiable = False

    def __init__(
        self,
        path: Text = PATH,
        *,
        detector: Literal["mask2former", "grounding_dino"] = "mask2former",
        clip: Text = "openai/clip-vit-large-patch14",
        threshold: Share = 0.3,
        counting_threshold: Share = 0.9,
        position_threshold: Share = 0.1,
        max_objects: Count = 16,
        device: DeviceName = "cpu",
    ):
        self.device = torch.device(device)
        self.detector = DETECTORS[detector](path, self.device)
        self.clip = ClipReward(clip, device=device)
        self.threshold, self.counting_threshold, self.slack, self.most = threshold, counting_threshold, position_threshold, max_objects

    @staticmethod
    def needs(options: dict[str, Any]) -> list[str]:
        """What is loaded of a repository: the detector's own files."""
        return [""]

    @staticmethod
    def unreadable(rows: list[dict[str, Any]]) -> str:
        """Why these prompts cannot be judged, if so."""
        for row in rows:
            wanted, unwanted, prompt = row.get("include"), row.get("exclude") or [], f"'{str(row.get('prompt'))[:60]}'"
            if not isinstance(wanted, list) or not isinstance(unwanted, list) or not all(map(_object, [*wanted, *unwanted])):
                return f"needs GenEval's metadata beside every prompt (include: [{{class, count, ...}}], tag), and {prompt} has none: take its evaluation_metadata.jsonl"
            if not wanted and not unwanted:
                return f"needs an object that a picture has to show, and {prompt} asks for none under include or exclude"
            for k, w in enumerate(map(said, wanted)):
                place = w.get("position")
                if "position" in w and not (isinstance(place, list) and len(place) == 2 and place[0] in RELATIONS and place[1] in range(k)):
                    return f"cannot read the position {place!r} of {prompt}: it is one of {', '.join(RELATIONS)} and the number of an earlier object"
                if "color" in w and w["color"] not in COLOURS:
                    return f"knows the colours {', '.join(COLOURS)}, and {prompt} asks for {w['color']!r}"
        return ""

    @staticmethod
    def lacking(options: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Which classes of these rows the detector was not trained on, by its configuration, if so; Grounding DINO is asked for any."""
        try:
            labels = read_json(hub.model_folder(options.get("path", PATH), WHAT) / "config.json", WHAT).get("id2label")
        except UserError:
            return ""  # which is told of the path
        if options.get("detector", "mask2former") != "mask2former" or not isinstance(labels, dict):
            return ""
        asked = dict.fromkeys(w["class"] for row in rows for w in (*(row.get("include") or ()), *(row.get("exclude") or ())))
        unknown = [name for name in asked if NAMES.get(name, name) not in labels.values()]
        return (
            f"is asked for {', '.join(unknown[:8])}, and its detector knows {', '.join(list(labels.values())[:8])}, ..." if unknown else ""
        )

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        """[B] of 0 and 1, each picture by itself."""
        return torch.tensor([float(not self.unshown(image, row)) for image, row in zip(images, batch.facts)], device=images.device)

    def unshown(self, image: Tensor, row: dict[str, Any]) -> list[str]:
        """What a picture [3, H, W] does not show of its row."""
        picture = to_image(image)
        names = list(dict.fromkeys(w["class"] for w in (*(row.get("include") or ()), *(row.get("exclude") or ()))))
        least = self.counting_threshold if row.get("tag") == "counting" else self.threshold
        seen = self.detector(picture, names)
        objects = {name: [f for f in own if f.confidence > least][: self.most] for name, own in seen.items()}
        return unmet(objects, row, lambda found, name: self.colours(picture, found, name), self.slack)

    @torch.no_grad()
    def colours(self, picture: Image.Image, found: list[Found], name: str) -> list[str]:
        """The colour of each object by CLIP, cut out and put on grey."""
        phrases = [[p.format(colour=colour, name=name) for p in PHRASES] for colour in COLOURS]
        known = torch.stack([F.normalize(self.clip.embed_texts(own).mean(0), dim=-1) for own in phrases])
        out = []
        for one in found:
            cut = (
                picture
                if one.mask is None
                else Image.composite(picture, Image.new("RGB", picture.size, GREY), Image.fromarray(one.mask.numpy()))
            )
            pixels = torch.from_numpy(_array(cut.crop(tuple(round(v) for v in one.box)))).permute(2, 0, 1).float()[None] / 255
            embedding = F.normalize(self.clip.encode(pixels)[0], dim=-1)
            out.append(COLOURS[int((embedding @ known.T).argmax())])
        return out

    def breakdown(self, scores: Tensor, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Accuracy of each task, and the mean over the tasks as `overall`."""
        tags = [str(row.get("tag", "all")) for row in rows]
        by_task = {tag: float(scores[torch.tensor([t == tag for t in tags])].double().mean()) for tag in dict.fromkeys(tags)}
        return {"overall": sum(by_task.values()) / len(by_task)} | by_task


def _array(picture: Image.Image) -> Any:
    import numpy as np

    return np.array(picture.convert("RGB"))


def _object(wanted: Any) -> bool:
    """Whether a row's entry names a class and how many."""
    count = wanted.get("count") if isinstance(wanted, dict) else None
    return isinstance(count, int) and not isinstance(count, bool) and count > 0 and isinstance(wanted.get("class"), str)
