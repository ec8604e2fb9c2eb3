"""The input pictures of the shared workflows, drawn: a portrait, and a full figure with a mask over its face."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SCALE = 4  # drawn larger, then reduced: smooth edges


def _canvas(width: int, height: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((width * SCALE, height * SCALE))
    return Image.composite(
        Image.new("RGB", ramp.size, bottom),
        Image.new("RGB", ramp.size, top),
        ramp,
    )


def _face(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    """Draw a face of radius r around (x, y)."""

    def oval(dx: float, dy: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse((x + (dx - rx) * r, y + (dy - ry) * r, x + (dx + rx) * r, y + (dy + ry) * r), fill=fill)

    oval(0, -0.25, 0.95, 1.15, (62, 40, 28))  # hair
    oval(0, 0.1, 0.72, 0.98, (226, 178, 150))
    for side in (-1, 1):
        oval(side * 0.3, -0.05, 0.15, 0.09, (246, 246, 244))
        oval(side * 0.3, -0.05, 0.07, 0.08, (58, 80, 96))
        oval(side * 0.3, -0.25, 0.18, 0.035, (72, 48, 34))
    oval(0, 0.27, 0.09, 0.14, (208, 152, 126))
    oval(0, 0.62, 0.24, 0.08, (178, 84, 84))


def _finish(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS)
    return small.filter(ImageFilter.GaussianBlur(0.5))


def portrait(size: int) -> Image.Image:
    """Return a square head-and-shoulders picture."""
    image = _canvas(size, size, (168, 190, 206), (96, 112, 120))
    draw, s = ImageDraw.Draw(image), size * SCALE
    draw.ellipse((0.14 * s, 0.78 * s, 0.86 * s, 1.4 * s), fill=(52, 84, 128))
    draw.rectangle((0.43 * s, 0.66 * s, 0.57 * s, 0.84 * s), fill=(206, 158, 132))
    _face(draw, 0.5 * s, 0.42 * s, 0.3 * s)
    return _finish(image)


def full_body(width: int) -> Image.Image:
    """Return a standing figure, half as high again as wide, whose alpha channel is 0 over the face.

    ComfyUI's mask editor stores a mask that way, and Load Image returns 1 - alpha as the mask.
    """
    height = width * 3 // 2
    image = _canvas(width, height, (150, 196, 232), (214, 224, 220))
    draw, s = ImageDraw.Draw(image), width * SCALE
    draw.rectangle((0, 1.05 * s, s, 1.5 * s), fill=(104, 148, 84))  # lawn
    for x, r in ((0.12, 0.2), (0.9, 0.26)):
        draw.rectangle(((x - 0.02) * s, 0.8 * s, (x + 0.02) * s, 1.12 * s), fill=(94, 70, 50))
        draw.ellipse(((x - r) * s, (0.78 - r) * s, (x + r) * s, (0.78 + r) * s), fill=(70, 118, 66))
    for side in (-1, 1):  # legs, shoes, arms
        draw.line(((0.5 + side * 0.05) * s, 0.85 * s, (0.5 + side * 0.07) * s, 1.32 * s), (44, 52, 78), int(0.075 * s))
        draw.ellipse(((0.46 + side * 0.07) * s, 1.29 * s, (0.56 + side * 0.07) * s, 1.35 * s), fill=(40, 34, 32))
        draw.line(((0.5 + side * 0.11) * s, 0.46 * s, (0.5 + side * 0.18) * s, 0.84 * s), (190, 60, 58), int(0.06 * s))
    draw.rounded_rectangle((0.38 * s, 0.4 * s, 0.62 * s, 0.92 * s), 0.06 * s, fill=(204, 66, 62))
    draw.rectangle((0.47 * s, 0.34 * s, 0.53 * s, 0.42 * s), fill=(206, 158, 132))
    _face(draw, 0.5 * s, 0.24 * s, 0.12 * s)
    result = _finish(image)
    alpha = Image.new("L", result.size, 255)
    ImageDraw.Draw(alpha).ellipse((0.38 * width, 0.09 * width, 0.62 * width, 0.4 * width), fill=0)
    result.putalpha(alpha)
    return result


def write_inputs(folder: Path, size: int) -> None:
    """Write the pictures under the names the workflows use, `size` pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    portrait(size).save(folder / "portrait.png")
    full_body(size).save(folder / "full-body.png")
