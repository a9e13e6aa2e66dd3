"""Published sets in little, laid out as they come: what README's commands name."""

import io
import json
import tarfile
from importlib.util import find_spec

import numpy as np
from PIL import Image


def png(shade, side=8):
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(out, format="PNG")
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return str(path)


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


KARPATHY = {
    "dataset": "flickr30k",
    "images": [
        {"filename": "1.png", "split": "test", "imgid": 0, "sentences": [{"raw": "A cat. "}, {"raw": "Two cats."}]},
        {"filename": "2.png", "split": "train", "imgid": 1, "sentences": [{"raw": "A dog."}]},
    ],
}
COCO = {
    "info": {}, "licenses": [],
    "images": [{"id": 7, "file_name": "1.png"}, {"id": 9, "file_name": "2.png"}, {"id": 11, "file_name": "3.png"}],
    "annotations": [{"image_id": 9, "id": 1, "caption": "A dog."}, {"image_id": 7, "id": 2, "caption": "A cat."}, {"image_id": 7, "id": 3, "caption": "Two cats."}],
}  # fmt: skip
AVA = "1 11 0 0 0 0 0 0 0 0 0 4 1 2 3\n2 12 1 0 0 0 0 0 0 0 0 1 0 0 3\n3 13 1 1 1 1 1 1 1 1 1 1 0 0 3\n"
PAIRS = [  # Pick-a-Pic's columns
    {"caption": "one", "jpg_0": png(10), "jpg_1": png(20), "label_0": 1.0, "label_1": 0.0, "has_label": True},
    {"caption": "two", "jpg_0": png(30), "jpg_1": png(40), "label_0": 0.0, "label_1": 1.0, "has_label": True},
    {"caption": "tie", "jpg_0": png(50), "jpg_1": png(60), "label_0": 0.5, "label_1": 0.5, "has_label": True},
    {"caption": "asked of nobody", "jpg_0": png(50), "jpg_1": png(60), "label_0": None, "label_1": None, "has_label": False},
]


def lay_out(root):
    """Every set that README has a command for, below a folder."""
    geneval = [{"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}], "prompt": "a photo of a bench and a dog"}]  # fmt: skip
    soft = [{"prompt": "six cows", "atom_count": 2, "vqa_list": [["How many cows?", "six"]], "skills": ["count"]}]
    for name, content in {
        "drawbench.csv": "Prompts,Category\nA red car.,Colors\n",
        "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n",
        "evaluation_metadata.jsonl": "".join(json.dumps(row) + "\n" for row in geneval),
        "geneval2_data.jsonl": "".join(json.dumps(row) + "\n" for row in soft),
        "HPDv2/benchmark/anime.json": ["a girl", "a boy"],
        "HPDv2/train.json": [{"prompt": "p", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1], "user_hash": "x"}],
        "HPDv2/test.json": [{"prompt": "p", "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [2, 1, 3], "raw_annotations": []}],
        "T2I-CompBench/color_val.txt": "a green bench and a blue bowl\n",
        "dpg_bench/prompts/10.txt": "a long prompt\n",
        "dpg_bench/prompts/2.txt": "a cat",
        "ocr/test.txt": 'A sign that says "OPEN"\n',
        "imagefolder/metadata.csv": "file_name,text\ntrain/1.png,a cat\ntrain/2.png,a dog\n",
        "dataset_coco.json": {"images": [image | {"filepath": "val2014"} for image in KARPATHY["images"]], "dataset": "coco"},
        "dataset_flickr30k.json": KARPATHY,
        "AVA.txt": AVA,
    }.items():
        write(root / name, content)
    for folder, suffix in (("HPDv2/train", "jpg"), ("HPDv2/test", "jpg"), ("imagefolder/train", "png"), ("coco/val2014", "png"), ("flickr30k", "png")):  # fmt: skip
        for k in (1, 2, 3)[: 2 if folder == "imagefolder/train" else 3]:
            write(root / folder / f"{k}.{suffix}", png(40 * k))
    for name in ("11", "12"):
        write(root / "ava" / f"{name}.jpg", png(int(name)))
    for k in (0, 1):
        tar(root / "shards" / f"{k:05d}.tar", [(f"{k}.png", png(40 + k)), (f"{k}.txt", b"one\n"), (f"{k}.json", b'{"key": "x"}')])
    if find_spec("pyarrow"):
        parquet(root / "pickapic" / "validation-00000-of-00001.parquet", PAIRS)
        parquet(root / "data" / "train-0.parquet", [{"image": {"bytes": png(40), "path": "a.png"}, "caption": ["one", "uno"], "k": 1}])
