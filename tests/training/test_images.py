"""Images of every kind, against pixels worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from comfyui_gcfg.training.data.images import BrokenImage, Geometry, find_images, fit_image, read_image
from PIL import Image
from sklearn.datasets import load_sample_images

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def colours():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def grey():
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture(scope="module")
def alpha():
    return np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def decoded(data):
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def over_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def in_three(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, 2)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, rows, extra=b""):
    """A PNG by the specification, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("options", [{"form": "PNG"}, {"form": "WEBP", "lossless": True}])
def test_lossless_colours_are_exact(colours, options):
    assert (decoded(encoded(colours, **options)) == colours).all()


def test_grey_and_one_bit_fill_three_channels(grey):
    assert (decoded(encoded(grey)) == in_three(grey)).all()
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert bits.mode == "1"
    assert (decoded(encoded(bits)) == in_three(np.where(grey >= 128, 255, 0))).all()


def test_alpha_is_laid_over_white(colours, grey, alpha):
    rgba = decoded(encoded(np.dstack([colours, alpha])))
    assert np.abs(rgba - over_white(colours, alpha)).max() <= 1
    la = decoded(encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])))
    assert np.abs(la - over_white(in_three(grey), alpha)).max() <= 1
    webp = decoded(encoded(np.dstack([colours, alpha]), "WEBP", lossless=True, exact=True))
    assert np.abs(webp - over_white(colours, alpha)).max() <= 1


def test_a_palette_with_transparency_is_laid_over_white(colours, grey, alpha):
    index = grey % 8
    palette = colours[0, :8]
    image = Image.fromarray(index)
    image.putpalette(palette.reshape(-1).tolist())
    assert image.mode == "P"
    assert (decoded(encoded(image)) == palette[index]).all()
    levels = alpha[0, :8]
    partly = decoded(encoded(image, transparency=levels.tobytes()))
    assert np.abs(partly - over_white(palette[index], levels[index])).max() <= 1
    one = decoded(encoded(image, transparency=3))
    assert (one == np.where((index == 3)[..., None], 255, palette[index])).all()


def test_a_transparent_colour_without_alpha_becomes_white(colours, grey):
    key = tuple(int(v) for v in colours[4, 5])
    expected = np.where((colours == key).all(-1, keepdims=True), 255, colours)
    assert (decoded(encoded(colours, transparency=key)) == expected).all()
    value = int(grey[4, 5])
    expected = np.where(grey == value, 255, grey)
    assert (decoded(encoded(grey, transparency=value)) == in_three(expected)).all()


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    data = encoded(values)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert (decoded(data) == in_three(np.round(values / 257))).all()
    key = int(values[3, 7])
    rows = [row.astype(">u2").tobytes() for row in values]
    data = png(WIDTH, HEIGHT, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", key)))
    assert (decoded(data) == in_three(np.where(values == key, 255, np.round(values / 257)))).all()


def test_16_bit_colours_and_16_bit_alpha():
    values = np.random.default_rng(3).integers(0, 65536, (HEIGHT, WIDTH, 4), dtype=np.uint16)
    rgb = png(WIDTH, HEIGHT, 16, 2, [row[:, :3].astype(">u2").tobytes() for row in values])
    assert np.abs(decoded(rgb) - values[..., :3] / 257).max() <= 1
    rgba = png(WIDTH, HEIGHT, 16, 6, [row.astype(">u2").tobytes() for row in values])
    assert np.abs(decoded(rgba) - over_white(values[..., :3] / 257, values[..., 3] / 257)).max() <= 2


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (30, 200, 90, 60), (0, 0, 0, 255)])
def test_cmyk_jpeg_has_the_printed_colours(ink):
    data = encoded(Image.new("CMYK", (32, 32), ink), "JPEG", quality=100)
    assert b"Adobe" in data  # written inverted, as Photoshop does
    expected = [(255 - colour) * (255 - ink[3]) / 255 for colour in ink[:3]]
    assert np.abs(decoded(data) - expected).max() <= 3


# What has to be done to the stored pixels, in numpy's words (EXIF 2.3, tag 0x0112).
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_applied(colours, alpha, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ORIENTATIONS[orientation]
    assert (decoded(encoded(colours, exif=exif)) == upright(colours)).all()
    rgba = np.dstack([colours, alpha])
    assert np.abs(decoded(encoded(rgba, exif=exif)) - upright(over_white(colours, alpha))).max() <= 1
    smooth = np.asarray(Image.fromarray(colours).resize((80, 48), Image.Resampling.BICUBIC))
    photo = decoded(encoded(smooth, "JPEG", quality=98, subsampling=0, exif=exif))
    assert photo.shape == upright(smooth).shape
    assert np.abs(photo - upright(smooth)).mean() < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"no TIFF header", b"MM\0*\0\0\0\x08\xff\xff\x01\x12", b"II*\0\xff\xff\xff\xff"])
def test_damaged_exif_does_not_spoil_the_picture(colours, exif):
    assert (decoded(encoded(colours, exif=b"Exif\0\0" + exif)) == colours).all()


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation(colours, form):
    frames = [Image.fromarray(255 - colours), Image.fromarray(colours // 2)]
    data = encoded(colours, form, save_all=True, append_images=frames, duration=50, lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decoded(data) == colours).all()


def test_a_phones_jpeg_with_a_second_picture_inside(colours):
    data = encoded(np.full_like(colours, 200), "MPO", save_all=True, append_images=[Image.fromarray(colours)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert (decoded(data) == 200).all()


def bomb():
    return png(60_000, 60_000, 8, 2, [b""])


BROKEN = {
    "empty": (lambda a: b"", "the file is empty"),
    "text": (lambda a: b"I am a text", "not a JPEG, PNG or WebP"),
    "a GIF": (lambda a: encoded(a, "GIF"), "not a JPEG, PNG or WebP"),
    "only a PNG's signature": (lambda a: encoded(a)[:8], "not a JPEG, PNG or WebP"),
    "half a JPEG": (lambda a: encoded(a, "JPEG")[:500], "(?i)truncated"),
    "a JPEG without its last bytes": (lambda a: encoded(a, "JPEG")[:-20], "truncated"),
    "half a progressive JPEG": (lambda a: encoded(a, "JPEG", progressive=True)[:-300], "truncated"),
    "half a PNG": (lambda a: encoded(a)[: HEIGHT * WIDTH], "truncated"),
    "a PNG with flipped bits": (lambda a: (d := encoded(a))[:500] + b"\0\0\0\0" + d[504:], "cannot be decoded"),
    "half a WebP": (lambda a: encoded(a, "WEBP")[:-200], "cannot be decoded"),
    "a decompression bomb": (lambda a: bomb(), "pixels"),
    "a mere line": (lambda a: encoded(np.zeros((1, 5000), np.uint8)), "narrower than 1 : 32"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_told_with_its_reason_on_one_line(colours, kind):
    make, reason = BROKEN[kind]
    with pytest.raises(BrokenImage, match=reason) as caught:
        read_image(make(colours))
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no addresses: quarantine.txt is the same every time


def test_images_are_found_by_suffix_in_all_visible_folders(tmp_path):
    names = ["b/z.png", "b/Größe 写真.WEBP", "a.JPG", "b/c/d/x.jpeg", "b.png", "B.Png"]
    ignored = [".hidden.png", ".cache/x.png", "b/.x/y/z.jpg", "notes.txt", "x.gif", "png", "b/archive.png.zip"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == sorted(names)


def test_links_are_followed_once_and_loops_end(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "real").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (data / "real" / "x.png", elsewhere / "y.png"):
        path.touch()
    (data / "a_link_sorted_before").symlink_to(data / "real")  # the real path wins
    (data / "real" / "up").symlink_to(data)
    (data / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data)
    (data / "dangling.png").symlink_to(tmp_path / "gone.png")
    found = [path.relative_to(data).as_posix() for path in find_images(data)]
    assert found == ["dangling.png", "linked/y.png", "real/x.png"]


def ramp(width, height):
    """A picture that tells each pixel's place: red grows to the right, green downwards, two pixels a level."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.dstack([x // 2, y // 2, 0 * x]).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "fit", "geometry"),
    [
        ((256, 128), "resize", Geometry(128, 256, 0, 0)),
        ((256, 128), "centre_crop", Geometry(128, 256, 0, 32)),
        ((100, 500), "centre_crop", Geometry(500, 100, 128, 0)),
        ((99, 201), "centre_crop", Geometry(201, 99, 33, 0)),
        ((40, 24), "resize", Geometry(24, 40, 0, 0)),
        ((40, 24), "centre_crop", Geometry(24, 40, 0, 22)),
    ],
)
def test_every_pixel_comes_from_its_place(size, fit, geometry):
    """Fitting maps pixel (i, j) of the square to one place of the original: scale, then shift by the crop."""
    width, height = size
    square, got = fit_image(ramp(width, height), 64, fit)
    assert got == geometry
    assert square.shape == (64, 64, 3)
    assert square.dtype == np.uint8
    scale = (64 / width, 64 / height) if fit == "resize" else (64 / min(size),) * 2
    i = np.arange(64) + 0.5
    x = (i + geometry.crop_left) / scale[0] - 0.5
    y = (i + geometry.crop_top) / scale[1] - 0.5
    inner = slice(4, -4)  # the filter is one-sided at the edges
    assert np.abs(square[..., 0].mean(0) - (x / 2 - 0.25))[inner].max() < 1
    assert np.abs(square[..., 1].mean(1) - (y / 2 - 0.25))[inner].max() < 1


def test_shrinking_is_antialiased():
    checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    square, _ = fit_image(Image.fromarray(checks).convert("RGB"), 64, "resize")
    assert np.abs(square.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_photograph_as_if_scaled_whole_and_then_cut(number):
    photo = Image.fromarray(load_sample_images().images[number])  # 640 x 427
    square, geometry = fit_image(photo, 256, "centre_crop")
    whole = photo.resize((384, 256), Image.Resampling.LANCZOS)
    assert geometry == Geometry(427, 640, 0, 64)
    difference = np.abs(square.astype(int) - np.asarray(whole)[:, 64 : 64 + 256])
    assert difference.mean() < 0.3
    assert difference.max() <= 16


def test_any_size_can_be_fitted():
    random = np.random.default_rng(5)
    for _ in range(300):
        width = int(random.integers(1, 300))
        height = int(np.clip(width * np.exp(random.uniform(-3, 3)), max(1, width / 32), 32 * width))
        for fit in ("resize", "centre_crop"):
            square, geometry = fit_image(Image.new("RGB", (width, height), (9, 99, 199)), 56, fit)
            assert square.shape == (56, 56, 3)
            assert (square == (9, 99, 199)).all()
            assert min(geometry.crop_top, geometry.crop_left) == 0
