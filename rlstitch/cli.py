"""What the scripts under launch/ share: recipe and overrides in, exit status out. A user's mistake ends in one message, not a traceback."""

from __future__ import annotations

import ctypes.util
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rlstitch.telling import is_main, last_word, of_machine, say
from rlstitch.types import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


def recipe_and_overrides(
    arguments: list[str],
    default: str | None = None,
    script: str = "",
    laid: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda given, overrides: given,
) -> tuple[str, dict[str, Any]]:
    """`recipe=NAME key=value ...` -> the recipe's name and the composed dict with overrides merged in; `model=NAME` is the whole part of that name (config.model_named). script: the launcher whose recipes are told of.
    laid: what of the overrides means more than its value; it takes that out of them and gives the recipe that the rest is merged into."""
    from rlstitch import config as cfg
    from rlstitch.protocols import look_in

    chosen = [a for a in arguments if a.startswith("recipe=")]
    if len(chosen) > 1 or not (chosen or default):
        raise UserError("name one recipe, as recipe=NAME; --help lists those there are")
    name = chosen[0].removeprefix("recipe=") if chosen else str(default)
    look_in(Path.cwd())
    look_in(cfg.find_recipe(name, only=lambda: recipes_of(Path(script).name)).parent)  # where a recipe of the user's has its own parts
    overrides = cfg.parse_overrides([a for a in arguments if not a.startswith("recipe=")])
    given = cfg.compose(name)
    if isinstance(model := overrides.get("model"), str) and "model" in given:
        given["model"] = cfg.model_named(model)
        del overrides["model"]
    return name, cfg.merge(laid(given, overrides), overrides)


def recipes_of(script: str) -> dict[str, str]:
    """Shipped recipes of a launcher and the first sentence of their headers; of every launcher where it has no name."""
    from rlstitch import config as cfg

    found = {}
    for path in sorted(cfg.RECIPES.glob("*.yaml")):
        own = next((launcher for key, launcher in cfg.LAUNCHERS.items() if key in cfg.top_keys(path)), "")
        if script in ("", own):
            header = " ".join(re.split(r"\n#   |\n[^#]", path.read_text(encoding="utf-8"))[0].replace("\n#", "").lstrip("# ").split())
            first = re.split(r"(?<=[a-z)\d])\. |   ", header)[0].rstrip(".")
            found[path.stem] = first if len(first) <= 120 else first[:117] + "..."
    return found


def run_and_overrides(arguments: list[str]) -> tuple[Path, dict[str, Any], str]:
    """`run=FOLDER key=value ...` -> the folder, the recipe saved in it with overrides merged in, and the path of `lora=PATH`, which is what that then starts from."""
    from rlstitch import checkpoint, resume
    from rlstitch import config as cfg
    from rlstitch.paths import home, what_is
    from rlstitch.protocols import look_in

    look_in(Path.cwd())
    chosen = [a for a in arguments if a.startswith("run=")]
    if len(chosen) != 1 or chosen == ["run="]:
        raise UserError("name one run folder, as run=runs/NAME")
    folder = home(chosen[0].removeprefix("run="))
    if what_is(folder / "recipe.yaml") != "a file":
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml")
    resume.as_it_should_be(folder)
    overrides = cfg.parse_overrides([a for a in arguments if not a.startswith("run=")])
    lora = overrides.pop("lora") if isinstance(overrides.get("lora"), str) else ""
    if not lora and not checkpoint.folders(folder):
        raise UserError(f"{folder} has no complete checkpoint to evaluate")
    given = cfg.merge(cfg.compose(str(folder / "recipe.yaml")), overrides)
    return folder, cfg.merge(given, {"lora": {"init": lora}}) if lora else given, lora


def keep_freed_memory() -> None:
    """Have glibc keep what large tensors free: a CPU run otherwise asks the system for zeroed pages at every operation.

    Forward and backward of the miniature on 32 pictures then meet no page fault where they met 8,000 to 19,000, which took 2 to 7 % of their CPU time on a virtual
    machine, and 0 to 2 % of an update's elsewhere.
    """
    libc = ctypes.util.find_library("c")
    if sys.platform != "linux" or not libc or not hasattr(library := ctypes.CDLL(libc), "mallopt"):
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        library.mallopt(option, value)


def help_page(script: str, about: str) -> str:
    """What a launcher does, how it is told what to do, and the recipes that are its own."""
    own = recipes_of("train.py" if script == "cost.py" else script)  # whose costs it tells
    key = "reward=NAME" if script == "check_reward.py" else "recipe=NAME"
    lines = [about.strip(), ""]
    if script != "pretrain_shapes.py":
        lines += [
            f"{key + ' key=value ...':<25} dots go deeper: threads=2 sampler.num_steps=20; lists and mappings in quotes: 'oracle.weights={{clip: 1.0}}'",
            "check=true                prints what would be done, and every fault at once; nothing is built or written",
            "keys=true                 every key with its default, range and meaning; with a recipe also what its parts take",
            "RLSTITCH_TRACEBACK=1      in the environment: where inside a part of your own something went wrong",
        ]
    if own:
        wide = max(map(len, own))
        lines += ["", "recipes (or a path to one of your own, which names pieces under `use`):"]
        lines += [f"  {name:<{wide}}  {header}" for name, header in own.items()]
    return "\n".join(lines)


SCHEMAS = {  # of each launcher: the module and name of its recipe's schema
    "train.py": ("rlstitch.schema", "RunConfig"),
    "evaluate.py": ("rlstitch.evaluation", "EvaluateConfig"),
    "steer.py": ("rlstitch.steer", "SteerConfig"),
    "stitch.py": ("rlstitch.stitch.recipe", "StitchRecipe"),
    "evaluate_value.py": ("rlstitch.stitch.compare", "CompareConfig"),
    "surrogate.py": ("rlstitch.stitch.surrogate", "SurrogateConfig"),
    "serve_reward.py": ("rlstitch.serving", "ServeConfig"),
    "cost.py": ("rlstitch.costs.report", "CostConfig"),
    "check_reward.py": ("rlstitch.reward_check", "CheckConfig"),
    "pretrain_shapes.py": ("rlstitch.shapes.pretrain.run", "PretrainConfig"),
}


def key_reference(script: str, arguments: list[str]) -> None:
    """Print every key of a launcher, and what the parts of a recipe take where one is named."""
    from rlstitch.keys import reference

    module, name = SCHEMAS[script]
    given = recipe_and_overrides(arguments, script=script)[1] if any(a.startswith("recipe=") for a in arguments) else {}
    say(reference(getattr(import_module(module), name), given))


def wants(arguments: list[str], *words: str) -> bool:
    return any(a in words for a in arguments)


def quiet() -> None:
    """Libraries say what went wrong and nothing else, draw no bars of their own, and ask no network."""
    from rlstitch import hub

    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub.keep_libraries_offline()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base are what we want
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # what accelerate sets of it by itself
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|diffusers|deepspeed")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()


def main(run: Callable[[list[str]], None], *, default: str = "") -> None:
    """Run a launcher, the function `run` of a script. A user's mistake, or an exception inside a part of theirs, ends in one line and status 2; a signal in 128 + its
    number; --help and, where there is no `default` recipe, no argument at all in a page about it."""
    arguments, script = sys.argv[1:], Path(run.__code__.co_filename).name
    if wants(arguments, "--help", "-h", "help") or not (arguments or default):
        say(help_page(script, str(sys.modules[run.__module__].__doc__)))
        sys.exit(0 if arguments else 2)
    keep_freed_memory()
    quiet()
    from rlstitch import memory, watch
    from rlstitch.asking import PartError, one_line, show
    from rlstitch.interrupt import Interrupted
    from rlstitch.protocols import naming, theirs

    try:
        with naming(), memory.told():
            if wants(arguments, "keys=true", "--keys"):
                key_reference(script, [a for a in arguments if a not in ("keys=true", "--keys")])
            else:
                run(arguments)
        watch.leave()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):  # a full disk, a folder that is gone or may not be written to
            watch.end_if_lost(error)
        text = str(error) if isinstance(error, UserError) else of_machine(error)
        watch.leave(text, said=is_main() or "TORCHELASTIC_ERROR_FILE" in os.environ)
        if not isinstance(error, PartError):  # which has been shown where it came from
            show(error)
        last_word(f"rlstitch: {text}")
        sys.exit(2)
    except Interrupted as stop:
        watch.leave()
        last_word("rlstitch: stopped on a signal; a checkpoint was written, the same command resumes")
        sys.exit(stop.code)
    except KeyboardInterrupt:
        watch.leave()
        last_word("rlstitch: stopped by Ctrl-C")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        watch.end_if_lost(error)
        watch.leave(one_line(error))
        if not theirs():
            raise
        show(error)  # more likely of what a part of the user's gave than of ours
        last_word(
            f"rlstitch: {one_line(error)}. Parts that are not of rlstitch take part: {', '.join(theirs())} (RLSTITCH_TRACEBACK=1 shows where)"
        )
        sys.exit(2)
