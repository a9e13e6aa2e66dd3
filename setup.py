from pathlib import Path

from setuptools import find_packages, setup

OUTSIDE = {"rlstitch.recipes": "recipes", "rlstitch.launch": "launch"}  # beside the package in a checkout, in it once installed
LAUNCHERS = (
    "train",
    "stitch",
    "steer",
    "evaluate",
    "evaluate_value",
    "surrogate",
    "serve_reward",
    "check_reward",
    "cost",
    "pretrain_shapes",
)

OCR = ["rapidocr>=3.10,<4", "onnxruntime>=1.20", "rapidfuzz>=3"]

setup(
    name="rlstitch",
    version="0.1.0",
    description="RL post-training for diffusion and flow models, with pixel rewards or stitched value models (StitchVM)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rlstitch", "rlstitch.*"]), *OUTSIDE],
    package_dir=OUTSIDE,
    entry_points={"console_scripts": [f"rlstitch-{name.replace('_', '-')} = rlstitch.launch.{name}:main" for name in LAUNCHERS]},
    package_data={
        "rlstitch.shapes": ["weights/*", "weights/*/*", "weights/*/*/*"],
        "rlstitch.recipes": ["*.yaml", "*/*.yaml"],
        "rlstitch.launch": ["slurm.sbatch", "hostfile.example"],
    },
    install_requires=[
        "torch>=2.6,<2.14",
        "diffusers>=0.42,<0.43",
        "transformers>=5.17,<6",
        "huggingface_hub>=1.32,<3",
        "peft>=0.21,<0.22",
        "accelerate>=1.15,<2",
        "deepspeed>=0.19.8,<0.20",
        "omegaconf>=2.4,<2.5",
        "pyyaml>=6",
        "wandb>=0.31,<0.32",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "numpy>=2",
        "pillow>=11",
        "tqdm>=4.66",
        "jinja2",
    ],
    extras_require={
        "parquet": ["pyarrow>=18"],
        "bitsandbytes": ["bitsandbytes>=0.45"],
        "torchao": ["torchao>=0.16"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.8", "scipy>=1.13", *OCR],
        "ocr": OCR,
        "drift": ["torchmetrics>=1.6"],
    },
)
