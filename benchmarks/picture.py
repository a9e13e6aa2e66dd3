"""Before and after, side by side, from a finished run's sample grids.

python -m benchmarks.picture run=runs/draft_stitch
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import RESULTS, arguments
from rlstitch.config import compose


def main() -> None:
    run = Path(arguments({"run": "runs/draft_stitch"})["run"])
    k = compose(str(run / "recipe.yaml"))["algorithm"]["grad_steps"]
    grids = {"base model": run / "samples" / "base.png", f"after DRaFT-{k} + StitchVM": run / "samples" / "ema.png"}
    images = {title: Image.open(path).convert("RGB") for title, path in grids.items()}
    width, height = sum(i.width for i in images.values()) + 24, max(i.height for i in images.values()) + 36
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(20), 0
    for title, image in images.items():
        draw.text((x + 10, 8), title, fill="black", font=font)
        sheet.paste(image, (x, 36))
        x += image.width + 24
    sheet.save(RESULTS / "before_after.png")


if __name__ == "__main__":
    main()
