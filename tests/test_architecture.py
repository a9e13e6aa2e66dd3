"""The house rules that a machine can check: imports point down, files stay short, importing is quick."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlstitch"

# A module may import rooms of a smaller number, its own room's helpers, and nothing above.
FLOORS = {
    "types": 0, "ranges": 0, "strict_yaml": 0, "figures": 0, "paths": 0.1,
    "schema": 0.2, "memory": 0.3, "telling": 0.4, "asking": 0.5, "filling": 0.5, "protocols": 0.6, "holding": 0.65,
    "files": 0.7, "downloads": 0.7, "hub": 0.75, "fingerprints": 0.8, "adapters": 0.8, "config": 1, "distributed": 1, "interrupt": 1,
    "zero": 0.5, "watch": 0.5, "compiled": 0.5, "lock": 1, "tracker": 1.5, "resume": 5,
    "schedule": 1, "scheduler": 2, "weights": 2,
    "stops": 2, "losses": 2, "advantages": 2, "prompts": 2, "cache": 2, "metrics": 2, "backbones": 3, "rewards": 3, "shapes": 2,
    "lengths": 2.5, "data": 3, "picture_rows": 2, "pictures": 3, "picture_sets": 4, "sampling": 3, "stitch.model": 3, "stitch.layer": 2, "policy": 3,
    "oracles": 4, "parts": 4.5, "checkpoint": 4, "report": 4,
    "stitch.search": 5, "stitch.distill": 5, "stitch.baselines": 6, "stitch.measure": 6, "stitch.refresh": 6, "stitch.generate": 6, "stitch.compare": 7, "stitch.surrogate": 7, "algorithms": 5, "steering": 5, "evaluate": 5, "evaluation": 8, "comparison": 8.5, "results": 2, "drift": 4, "steer": 7, "scoring": 5,
    "stitch.loop": 6.5, "stitch.store": 6.5, "stitch.recipe": 7, "checks": 6, "part_checks": 5.5,
    "contract": 2, "reward_check": 7, "keys": 2, "describe": 8, "endings": 6, "trainer": 7, "stages": 4, "guard": 5, "serving": 7,
    "costs.counting": 8, "costs.pricing": 8.5, "costs": 8.7, "cli": 9,
}  # fmt: skip


def floor(module: str) -> tuple[str, int]:
    parts = module.split(".")
    for length in (2, 1):
        if (key := ".".join(parts[:length])) in FLOORS:
            return key, FLOORS[key]
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlstitch"):
            found |= {
                f"{node.module}.{alias.name}" if (PACKAGE.parent / node.module.replace(".", "/")).is_dir() else node.module
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rlstitch")}
    return {name.removeprefix("rlstitch.") for name in found if name != "rlstitch"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path


def test_imports_point_down():
    wrong = []
    for name, path in modules():
        if not path.read_text().strip():
            continue
        mine, height = floor(name)
        for imported in imports(path):
            theirs, depth = floor(imported)
            if theirs != mine and depth >= height:
                wrong.append(f"{name} (floor {height}) imports {imported} (floor {depth})")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_backbones_or_rewards():
    for name, path in modules():
        for imported in imports(path):
            for room in ("backbones", "rewards"):
                assert not imported.startswith(room) or name.startswith(room), f"{name} imports {imported}: recipes name it by dotted path"


def test_files_stay_under_400_lines():
    long = [
        f"{p.relative_to(ROOT)} ({n})"
        for folder in ("rlstitch", "launch", "benchmarks", "tests")
        for p in (ROOT / folder).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    ]
    assert not long, long
    assert all(len(p.read_text().splitlines()) < 40 for p in (ROOT / "launch").glob("*.py"))


def test_importing_rlstitch_is_quick():
    code = "import time, torch; t = time.perf_counter(); import rlstitch, rlstitch.types, rlstitch.schedule, rlstitch.cli; print(time.perf_counter() - t)"
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert seconds < 1.5


def test_no_file_outside_the_backbones_names_an_architecture():
    """In code; what is told to people may. The miniature's training builds one model, and it is one of them."""
    words = ("SD3", "StableDiffusion3", "Flux", "QwenImage", "ZImage", "Transformer2DModel")
    named = []
    for name, path in modules():
        if name.startswith(("backbones", "shapes.pretrain")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            said = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            said = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else said
            named += [f"{name}: {said}" for word in words if word in said]
    assert not named, named
    lines = {p.stem: len(p.read_text().splitlines()) for p in (PACKAGE / "backbones").glob("*.py")}
    assert all(lines[name] <= 90 for name in ("sd3", "flux", "flux2", "qwen", "zimage")), lines
