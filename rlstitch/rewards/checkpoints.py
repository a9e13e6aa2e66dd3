"""What lies at the path of a reward of the CLIP family, and how it is loaded: a model folder of transformers (`CLIPModel`, `SiglipModel`), or one file in open_clip's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from rlstitch import hub
from rlstitch.files import PICKLES, read_json, weight_files, worthless
from rlstitch.rewards import openclip, preprocessing
from rlstitch.rewards.preprocessing import Preprocessing
from rlstitch.rewards.towers import MODELS, Model
from rlstitch.types import UserError
from rlstitch.weights import fill_strictly, load_strictly, read_checkpoint, whole_files

WHAT = "the reward model"
CONFIG = "config.json"
CONFIGS = {"clip": (CLIPVisionConfig, CLIPTextConfig), "siglip": (SiglipVisionConfig, SiglipTextConfig)}
WEIGHTS = (".safetensors", *PICKLES)
SPOKEN = ("tokenizer.json", "vocab.json", "spiece.model")  # a folder with one of these has a tokenizer


@dataclass(frozen=True)
class Source:
    """`home`: the folder of its small files, None where a hub id names one file that is not here yet; `config`: of transformers' layout; `file`: the name of that in open_clip's,
    or None; `name`: what it is called. `options` are the recipe's."""

    home: Path | None
    config: dict[str, Any]
    file: str | None
    name: str
    options: dict[str, Any]

    @property
    def kind(self) -> str:
        """A key of `MODELS`."""
        return "clip" if self.file else self.config.get("model_type") or "clip"

    @property
    def checkpoint(self) -> Path:
        """The file in open_clip's layout."""
        return self.home / self.file


def source(options: dict[str, Any]) -> Source:
    """What a recipe's reward is to be loaded from, by its small files. Raises UserError where that cannot be told."""
    path = options["path"]
    if (named := hub.parsed_file(path, pickles=True)) and named[1]:
        found = hub.file_here(path)
        return Source(found and found.parent, {}, Path(named[1]).name, path.split("@")[0], options)
    folder = hub.model_folder(path, WHAT)
    if folder.is_file():
        if folder.suffix not in WEIGHTS:
            raise UserError(f"{WHAT} '{path}' is no folder and no file of weights ({', '.join(WEIGHTS)})")
        return Source(folder.parent, {}, folder.name, str(folder), options)
    config = read_json(folder / CONFIG, "the reward model's config") if (folder / CONFIG).is_file() else {}
    name, names = (hub.parsed(path) or [str(folder)])[0], {f.name for f in folder.iterdir() if f.is_file()}
    if config and not _has_weights(folder, options.get("variant"), names):  # they may still have to come, or be open_clip's
        names = hub.names(path, WHAT)
    if config and (_has_weights(folder, options.get("variant"), names) or not any(n in openclip.FILES for n in names)):
        kind = config.get("model_type") or "clip"
        if kind == "siglip2":
            raise UserError(
                f"{WHAT} '{path}' is a SigLIP 2 of a variable grid (NaFlex), and only those of a fixed grid are read here: take one such as google/siglip2-so400m-patch14-384"
            )
        if kind not in MODELS:
            raise UserError(f"{WHAT} '{path}' is a {kind}, and only {' and '.join(MODELS)} are read here")
        return Source(folder, config, None, name, options)
    return Source(folder, config, _picked(hub.names(path, WHAT), path), name, options)


def _has_weights(folder: Path, variant: str | None, names: set[str]) -> bool:
    try:
        return bool(weight_files(folder, WHAT, variant, names))
    except UserError:
        return False


def _picked(names: set[str], path: str) -> str:
    """The checkpoint in open_clip's layout among a folder's files."""
    files = sorted(n for n in names if Path(n).suffix in WEIGHTS)
    if found := next((n for n in openclip.FILES if n in files), files[0] if len(files) == 1 else None):
        return found
    if files:
        raise UserError(
            f"{WHAT} '{path}' has no {CONFIG}, and {len(files)} files of weights ({', '.join(files[:5])}): name one, {path}/{files[0]}"
        )
    raise UserError(
        f"{WHAT} '{path}' has neither a {CONFIG} with weights nor a checkpoint of open_clip's ({openclip.FILES[-1]}): download it whole"
    )


def needs(found: Source) -> list[str]:
    """What is loaded of a repository: its top folder, or one file."""
    return [found.file] if found.file else [""]


def built(found: Source, what: str = WHAT) -> dict[str, Any]:
    """`architecture` of a checkpoint in open_clip's layout, by its names and shapes alone. Raises UserError where it is none, or is another one than it is called."""
    shapes = openclip.plain(read_checkpoint(found.checkpoint, what, shapes=True))
    architecture = openclip.architecture(shapes, openclip.settings(found.home), f"{what} {found.checkpoint}")
    if why := openclip.another(found.name, found.checkpoint, architecture):
        raise UserError(f"{what} {found.checkpoint} {why}")
    return architecture


def check(found: Source) -> None:
    """Raises UserError where the weights, as far as they are here, cannot be those of the model."""
    if found.file is None:
        whole_files(found.home, WHAT, found.options.get("variant"))
    else:
        activation(found)
        if here(found):
            built(found)


def here(found: Source) -> bool:
    """Whether what tells the towers' sizes is on this machine already."""
    return found.file is None or (found.home is not None and found.checkpoint.is_file())


def activation(found: Source) -> str | None:
    """The recipe's, else open_clip's; None where the configuration says it."""
    given = found.options.get("activation")
    return given if found.file is None else openclip.activation_of(found.name, openclip.settings(found.home), given)


def towers(found: Source) -> tuple[Any, Any]:
    """Configurations of image and text tower; what its file leaves out is transformers' own."""
    said = built(found) if found.file else found.config
    return tuple(cls(**(said.get(key) or {})) for cls, key in zip(CONFIGS[found.kind], ("vision_config", "text_config")))


def side(found: Source) -> int:
    """Pixels a side that the image tower takes."""
    return towers(found)[0].image_size


def prepared(found: Source, side: int) -> Preprocessing:
    """How pictures are prepared: as the processor's file says, else open_clip's, which may stand beside a model of transformers' layout, too."""
    resize, other = found.options.get("resize", "auto"), found.options.get("processor")
    folder = hub.model_folder(other, "the reward's processor") if other else found.home
    if other or (found.file is None and (preprocessing.told(folder) or not (folder / openclip.SETTINGS).is_file())):
        return preprocessing.read(folder, side, resize)
    usual = (openclip.known(found.name) or (None, "shortest_crop"))[1]
    return preprocessing.of_open_clip(openclip.settings(found.home).get("preprocess_cfg") or {}, side, resize, usual)


def tokenizer(found: Source) -> Any:
    """Of the recipe's `tokenizer` or `processor`, else of the model's own folder. Raises UserError where there is none, or it cannot be loaded."""
    key = next((key for key in ("tokenizer", "processor") if found.options.get(key)), None)
    folder = hub.model_folder(found.options[key], f"the reward's {key}") if key else found.home
    if found.file and key is None and not (folder and any((folder / name).is_file() for name in SPOKEN)):
        raise UserError(
            f"{WHAT} '{found.name}' has no tokenizer beside it: set tokenizer to a folder or hub id that has CLIP's, e.g. tokenizer: openai/clip-vit-large-patch14"
        )
    try:
        if found.kind == "clip":
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        said = folder / "tokenizer_config.json"
        name = read_json(said, "the reward's tokenizer").get("tokenizer_class") if said.is_file() else None
        # SigLIP's own class needs sentencepiece, and its tokenizer.json does not
        fast = (folder / "tokenizer.json").is_file() and str(name).startswith(
            ("SiglipTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
        )
        return (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"the tokenizer of the reward model '{folder}' needs sentencepiece: pip install sentencepiece") from error
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        raise UserError(f"the tokenizer of the reward model '{folder}' cannot be loaded: {error}") from error


def written(kind: str, prompts: list[str]) -> list[str]:
    """Prompts as the text tower has learned to read them: SigLIP's has seen small letters alone, which not every tokenizer of it sees to."""
    return [p.lower() for p in prompts] if kind == "siglip" else list(prompts)


def empty(found: Source, **options: Any) -> Model:
    """The model on the meta device, without weights."""
    vision, text = towers(found)
    config = MODELS[found.kind].config_class(vision_config=vision.to_dict(), text_config=text.to_dict(), **_projection(found))
    with torch.device("meta"):
        return MODELS[found.kind]._from_config(config, **options)


def _projection(found: Source) -> dict[str, Any]:
    said = built(found) if found.file else found.config
    return {"projection_dim": said["projection_dim"]} if "projection_dim" in said else {}


def load(found: Source, tokens: Any, **options: Any) -> Model:
    """The model in float32, strictly. options: of `from_pretrained`."""
    act = activation(found)
    if found.file is None:
        variant = found.options.get("variant")
        if act is not None:
            config = MODELS[found.kind].config_class.from_pretrained(found.home, local_files_only=True)
            config.vision_config.hidden_act = config.text_config.hidden_act = act
            options["config"] = config
        return load_strictly(MODELS[found.kind], found.home, WHAT, variant=variant, dtype=torch.float32, **options)
    architecture = built(found)
    ends, vocabulary = tokens.eos_token_id, architecture["text_config"]["vocab_size"]
    if len(tokens) != vocabulary or ends != vocabulary - 1:  # where open_clip reads the text off: at the largest
        raise UserError(
            f"{WHAT} '{found.name}' knows {vocabulary} tokens, and the tokenizer has {len(tokens)}, of which {ends} ends a prompt: set tokenizer to a folder or hub id that has this model's"
        )
    state = openclip.plain(read_checkpoint(found.checkpoint, WHAT))
    if why := worthless(state):
        raise UserError(f"{WHAT} {found.checkpoint} cannot be loaded: {why}. Download it again")
    config = openclip.configuration(architecture, act, ends)
    return fill_strictly(MODELS["clip"], config, openclip.converted(state), found.checkpoint, WHAT, dtype=torch.float32, **options)
