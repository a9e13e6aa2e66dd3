"""The paper's Table 4 in miniature: what each value model cost to find and to finetune, and what it keeps, read from the cards that launch/stitch.py wrote.

python -m benchmarks.value_cards [values=shapes:value_clip,shapes:value_hps,shapes:value_aesthetic]
"""

from pathlib import Path

from benchmarks.common import arguments, save, table
from rlstitch.files import require
from rlstitch.stitch.model import read_card

LEVELS = ("0.1", "0.25", "0.5", "0.75", "0.9")


def row_of(path: str) -> dict:
    """One value model: cost in seconds and device-hours, where it is cut, its size on disk, and its quality by sigma."""
    card, folder = read_card(path), require(path, "the value model")
    quality = {level: card["quality"][level] for level in LEVELS if level in card["quality"]}
    return {
        "value": card["name"],
        "search_seconds": card["search_seconds"],
        "pairs": len(card["search"]),
        "finetune_seconds": card["distill_seconds"],
        "finetune_steps": card["distill"]["steps"],
        "device_hours": card["device_hours"],
        "denoiser_blocks": card["blocks"],
        "reward_block": card["reward_block"],
        "megabytes": round(sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6, 2),
        "clean_recall_at_1": card.get("clean_recall_at_1"),
        "quality": quality,
        "hardware": card["hardware"],
    }


def main() -> None:
    options = arguments({"values": "shapes:value_clip,shapes:value_hps,shapes:value_aesthetic"})
    rows = [row_of(path) for path in options["values"].split(",")]
    head = ["value model", "search, s", "finetune, s", "whole, device-hours", "cut (denoiser, reward)", "MB"]
    lines = []
    for r in rows:
        measured = [q.get("recall_at_1", q.get("correlation")) for q in r["quality"].values()]
        cells = [
            r["value"],
            f"{r['search_seconds']:.1f} ({r['pairs']} pairs)",
            f"{r['finetune_seconds']:.0f} ({r['finetune_steps']} steps)",
        ]
        cells += [f"{r['device_hours']:.3f}", f"{r['denoiser_blocks']}, {r['reward_block']}", f"{r['megabytes']:.1f}"]
        lines.append([*cells, *(f"{m:.3f}" for m in measured)])
    note = (
        f"Recall@1 over 500 scenes, or the correlation with the clean reward where there is no recall. Stitched on: {rows[0]['hardware']}."
    )
    table("value_cards", [*head, *(f"sigma {level}" for level in LEVELS)], lines, note)
    save("value_cards", {"values": rows})


if __name__ == "__main__":
    main()
