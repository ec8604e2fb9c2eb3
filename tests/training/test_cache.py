"""The cache of latents: against the VAE by hand, over changes of the images, and through kills."""

import errno
import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.data import decode, shards
from comfyui_gcfg.training.data.cache import build_cache
from comfyui_gcfg.training.data.cache_plan import list_images, plan_cache
from comfyui_gcfg.training.data.shards import Latents, Recipe, find_shards, read_shard, vae_fingerprint
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SCRIPT = Path(__file__).with_name("caching_process.py")


def make_vae(seed=0, **config):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32,
        **config,
    ).eval()


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def recipe(vae):
    return Recipe(vae_fingerprint(vae), 64, "centre_crop", True)


class Counting:
    """The VAE, counting the images of every call; out of memory above a number of them."""

    def __init__(self, vae, most=10**6, error=None):
        self.vae, self.most, self.error, self.calls = vae, most, error, []

    def __getattr__(self, name):
        return getattr(self.vae, name)

    def encode(self, x):
        if len(x) > self.most:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        self.calls.append(len(x))
        return self.vae.encode(x)


@pytest.fixture
def images(tmp_path):
    """Ten scanned digits, two photographs, two broken files; by path: a/0..9, b/photo0..1 with b/broken, c/text."""
    folder = tmp_path / "images"
    for name in "abc":
        (folder / name).mkdir(parents=True)
    for number, digit in enumerate(load_digits().images[:10]):
        Image.fromarray((digit * 255 / 16).astype(np.uint8)).save(folder / "a" / f"{number}.png")
    for number, photo in enumerate(load_sample_images().images):
        Image.fromarray(photo).resize((160, 107)).save(folder / "b" / f"photo{number}.jpg", quality=95)
    (folder / "b" / "broken.jpg").write_bytes((folder / "b" / "photo0.jpg").read_bytes()[:3000])
    (folder / "c" / "text.PNG").write_text("no image")
    return folder


def built(images, folder, vae, recipe, **options):
    options = {"shard_size": 4, "batch_size": 3, "workers": 0} | options
    return build_cache(images, folder, vae, recipe, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_hand(vae, path, size=64, flip=False):
    """Mean and standard deviation of one image, from the path on."""
    image = Image.open(path).convert("RGB")
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size))).astype(np.float32)
    x = torch.from_numpy(pixels / 255 * 2 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        found = vae.encode(torch.flip(x, [3]) if flip else x).latent_dist
    return found.mean[0], found.std[0]


def test_latents_are_the_vaes_own_flips_encoded_apart(tmp_path, images, vae, recipe):
    report = built(images, tmp_path / "cache", vae, recipe, workers=2)
    assert (report.encoded, report.reused, report.broken, report.shards) == (12, 0, 2, 4)
    latents = Latents.open(tmp_path / "cache", recipe)
    assert latents.paths == [f"a/{n}.png" for n in range(10)] + ["b/photo0.jpg", "b/photo1.jpg"]
    assert (len(latents), latents.shape, latents.flips) == (12, (4, 8, 8), True)
    for i, path in enumerate(latents.paths):
        for flipped in (False, True):
            got = latents[i, flipped]
            expected = by_hand(vae, images / path, flip=flipped)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == torch.float32
                assert ours.shape == (4, 8, 8)
                # fp16 has 2^-11; a level of rounding in a photo's pixels is 1/255 of the input
                torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 if "photo" in path else 1e-4)
        mirrored = latents[i, False][0].flip(-1)
        assert (latents[i, True][0] - mirrored).abs().max() > 1e-2  # so flipping latents would not do
    assert latents.geometry(0) == (8, 8, 0, 0)
    assert latents.geometry(11) == (107, 160, 0, 16)
    broken, text = (tmp_path / "cache" / "quarantine.txt").read_text().splitlines()
    assert broken.startswith("b/broken.jpg\tcannot be decoded: image file is truncated")
    assert text == "c/text.PNG\tnot a JPEG, PNG or WebP image, or its header is damaged"


def test_without_flips_and_resized_whole(tmp_path, images, vae, recipe):
    plain = Recipe(recipe.vae, 64, "resize", False)
    built(images, tmp_path / "cache", vae, plain)
    latents = Latents.open(tmp_path / "cache", plain)
    photo = Image.open(images / "b" / "photo1.jpg").resize((64, 64), Image.Resampling.LANCZOS)
    photo.save(tmp_path / "square.png")
    expected = by_hand(vae, tmp_path / "square.png")
    torch.testing.assert_close(latents[11, False][0], expected[0], rtol=2e-3, atol=2e-3)
    assert latents.geometry(11) == (107, 160, 0, 0)
    assert not latents.flips
    mask = os.umask(0)
    os.umask(mask)
    for path in find_shards(tmp_path / "cache"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # others may read it, if the user lets them
        with shards.safe_open(str(path), "pt") as file:
            assert sorted(file.keys()) == ["geometry", "mean", "std"]


def test_a_cache_that_is_complete_is_left_alone(tmp_path, images, vae, recipe):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe)
    before = content(folder)
    times = {path: path.stat().st_mtime_ns for path in find_shards(folder)}
    counting = Counting(vae)
    report = built(images, folder, counting, recipe, workers=1)
    assert (report.encoded, report.reused, report.broken, counting.calls) == (0, 12, 2, [])
    assert content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in find_shards(folder)} == times


def test_only_what_changed_is_encoded_again(tmp_path, images, vae, recipe):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe)
    before = Latents.open(folder, recipe)
    old = {path: before[i, True][0] for i, path in enumerate(before.paths)}
    broken_once = images / "b" / "broken.jpg"
    shutil.copy(images / "a" / "5.png", images / "a" / "1.png")  # another digit
    os.utime(images / "a" / "2.png")  # touched
    shutil.copy(images / "a" / "6.png", tmp_path / "same")
    (images / "a" / "6.png").unlink()
    shutil.copy(tmp_path / "same", images / "a" / "6.png")  # the same again, in a new file
    (images / "a" / "7.png").unlink()
    (images / "b" / "photo0.jpg").unlink()
    shutil.copy(images / "b" / "photo1.jpg", broken_once)  # repaired
    os.utime(images / "c" / "text.PNG")
    shutil.copy(images / "a" / "3.png", images / "a" / "33.png")  # new
    counting = Counting(vae)
    report = built(images, folder, counting, recipe)
    assert sum(counting.calls) == 2 * 3  # 1.png, broken.jpg, 33.png, and their flips
    assert (report.encoded, report.reused, report.broken) == (3, 9, 1)
    after = Latents.open(folder, recipe)
    assert after.fingerprint != before.fingerprint
    kept = set(after.paths) - {"a/1.png", "b/broken.jpg", "a/33.png"}
    assert kept == set(old) - {"a/1.png", "a/7.png", "b/photo0.jpg"}
    new = {path: after[i, True][0] for i, path in enumerate(after.paths)}
    assert all(torch.equal(new[path], old[path]) for path in kept)
    torch.testing.assert_close(new["a/1.png"], old["a/5.png"], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(new["a/33.png"], old["a/3.png"], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(new["b/broken.jpg"], old["b/photo1.jpg"], rtol=2e-3, atol=1e-4)
    again = Counting(vae)
    assert built(images, folder, again, recipe).reused == 12
    assert again.calls == []
    assert "broken.jpg" not in (folder / "quarantine.txt").read_text()


def test_a_change_that_keeps_the_size_is_seen(tmp_path, images, vae, recipe):
    folder = tmp_path / "cache"
    path = images / "c" / "grey.png"
    ramp = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    Image.fromarray(ramp).save(path, compress_level=0)
    size = path.stat().st_size
    built(images, folder, vae, recipe)
    Image.fromarray(ramp.T).save(path, compress_level=0)
    assert path.stat().st_size == size
    assert built(images, folder, vae, recipe).encoded == 1
    latents = Latents.open(folder, recipe)
    expected = by_hand(vae, path)[0]
    torch.testing.assert_close(latents[latents.paths.index("c/grey.png"), False][0], expected, rtol=2e-3, atol=1e-4)


def test_the_fingerprint_follows_content_and_order_not_times_or_shards(tmp_path, images, vae, recipe):
    built(images, tmp_path / "one", vae, recipe)
    os.utime(images / "a" / "2.png")
    built(images, tmp_path / "two", vae, recipe, shard_size=100)
    one, two = (Latents.open(tmp_path / name, recipe) for name in ("one", "two"))
    assert len(find_shards(tmp_path / "two")) == 1
    assert one.fingerprint == two.fingerprint
    (images / "a" / "2.png").rename(images / "a" / "22.png")
    built(images, tmp_path / "two", vae, recipe)
    assert Latents.open(tmp_path / "two", recipe).fingerprint != one.fingerprint


def test_a_folder_of_broken_images_is_no_crash(tmp_path, vae, recipe):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(6):
        (images / f"{n}.png").write_bytes(b"broken" * n)
    (images / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (images / "io error.jpg").symlink_to("/proc/self/mem")  # reading its first byte fails, for root too
    report = built(images, tmp_path / "cache", vae, recipe, workers=1)
    assert (report.encoded, report.broken, report.shards) == (0, 8, 2)
    listed = (tmp_path / "cache" / "quarantine.txt").read_text().splitlines()
    assert listed[0] == "0.png\tthe file is empty"
    assert listed[6:] == [
        f"gone.jpg\tcannot be read: {os.strerror(errno.ENOENT)}",
        f"io error.jpg\tcannot be read: {os.strerror(errno.EIO)}",
    ]
    with pytest.raises(GuidanceError, match=r"holds no good image, expected at least one; see its quarantine\.txt"):
        Latents.open(tmp_path / "cache", recipe)


def test_a_broken_image_is_tried_again_only_when_it_changed_or_could_not_be_read(
    tmp_path, images, vae, recipe, monkeypatch
):
    folder = tmp_path / "cache"
    real = Path.read_bytes

    def refused(path):
        if path.name == "5.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    read = []
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert built(images, folder, vae, recipe).broken == 3
    assert "a/5.png\tcannot be read: Permission denied\n" in (folder / "quarantine.txt").read_text()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    assert built(images, folder, vae, recipe).encoded == 1  # nothing about the file itself has changed
    assert read == ["5.png"]
    assert "a/5.png" in Latents.open(folder, recipe).paths


def test_odd_names(tmp_path, vae, recipe):
    images = tmp_path / "images"
    images.mkdir()
    names = ["Größe 写真.png", "tab\tline\n.png", "'quote\".png", os.fsdecode(b"\xff\xfe latin.png")]
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
        shutil.copy(tmp_path / "x.png", images / name)
        (images / f"broken {name}").write_bytes(b"x")
    assert built(images, tmp_path / "cache", vae, recipe).encoded == 4
    assert Latents.open(tmp_path / "cache", recipe).paths == sorted(names)
    listed = (tmp_path / "cache" / "quarantine.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 4
    assert any(line.startswith("broken Größe 写真.png\t") for line in listed)
    assert built(images, tmp_path / "cache", vae, recipe).reused == 4


def other(recipe, **changes):
    return Recipe(**{**shards.asdict(recipe), **changes})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae": "f" * 64}, r"with another VAE \([0-9a-f]{12}; the config has ffffffffffff\)"),
        ({"resolution": 128}, r"with data\.resolution = 64, the config has 128"),
        ({"fit": "resize"}, r"with data\.fit = centre_crop, the config has resize"),
        ({"flips": False}, r"with data\.flips = true, the config has false"),
    ],
)
def test_a_cache_of_another_recipe_is_refused_and_made_anew(tmp_path, images, vae, recipe, change, words):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe, shard_size=7)
    wanted = other(recipe, **change)
    with pytest.raises(GuidanceError, match=rf"was made {words}; run `gcfg cache CONFIG` again"):
        Latents.open(folder, wanted)
    old = set(find_shards(folder))
    counting = Counting(vae)
    report = built(images, folder, counting, wanted, shard_size=7)
    assert (report.encoded, report.reused) == (12, 0)
    assert sum(counting.calls) == 12 * (1 + wanted.flips)
    assert not old & set(find_shards(folder))
    latents = Latents.open(folder, wanted)
    assert latents.shape == (4, wanted.resolution // 8, wanted.resolution // 8)


def test_no_cache_and_no_images_are_one_sentence(tmp_path, images, vae, recipe):
    with pytest.raises(GuidanceError, match=r"data\.cache '.*none' holds no cached latents; run `gcfg cache CONFIG`"):
        Latents.open(tmp_path / "none", recipe)
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe)
    before = content(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(GuidanceError, match=r"data\.images '.*empty' holds no image, expected"):
        built(empty, folder, vae, recipe)  # a folder that is not mounted must not cost the cache
    with pytest.raises(GuidanceError, match=r"data\.images '.*gone' was not found"):
        built(tmp_path / "gone", folder, vae, recipe)
    assert content(folder) == before


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(path):
    path.write_bytes(b"\xff" * 50 + path.read_bytes()[50:])


def damage_metadata(path):
    path.write_bytes(path.read_bytes().replace(b"entries", b"ENTRIES"))


@pytest.mark.parametrize("damage", [damage_cut, damage_header, damage_metadata])
def test_a_damaged_shard_is_told_and_made_anew(tmp_path, images, vae, recipe, damage):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe)
    before = content(folder)
    path = find_shards(folder)[1]
    damage(path)
    with pytest.raises(GuidanceError, match=rf"{path.name}' is damaged: .*; delete it and run `gcfg cache CONFIG`"):
        Latents.open(folder, recipe)
    built(images, folder, vae, recipe)
    assert content(folder) == before


def test_an_image_in_two_shards_is_refused_and_put_right(tmp_path, images, vae, recipe):
    """A crash between writing what is left of a shard and removing the shard, seen without its marker."""
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe)
    for number in range(3):
        old = content(folder)
        image = images / "a" / f"{number}.png"
        image.rename(tmp_path / image.name)
        built(images, folder, vae, recipe)
        new = content(folder)
        (gone,) = set(old) - set(new)
        (folder / gone).write_bytes(old[gone])
        with pytest.raises(GuidanceError, match="holds an image twice"):
            Latents.open(folder, recipe)
        plan = plan_cache(images, list_images(images), folder, recipe, 4)
        assert plan.jobs == ()  # all is there, whichever name comes first
        assert plan.stale == (folder / gone,)
        built(images, folder, vae, recipe)
        assert content(folder) == new


def test_latents_are_read_lazily_and_travel_to_other_processes(tmp_path, images, vae, recipe):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe, shard_size=1)
    handles = len(os.listdir("/proc/self/fd"))
    latents = Latents.open(folder, recipe)
    means = [latents[i, False][0] for i in range(len(latents))]
    assert len(os.listdir("/proc/self/fd")) == handles  # a mapped shard holds none
    copy = pickle.loads(pickle.dumps(latents))
    assert copy.fingerprint == latents.fingerprint
    assert all(torch.equal(copy[i, False][0], mean) for i, mean in enumerate(means))


def test_a_shard_missing_in_the_middle_is_made_as_before(tmp_path, images, vae, recipe):
    folder = tmp_path / "cache"
    built(images, folder, vae, recipe, workers=1)
    before = content(folder)
    paths = find_shards(folder)
    for path in paths[::2]:
        path.unlink()
    counting = Counting(vae)
    built(images, folder, counting, recipe)
    assert content(folder) == before
    assert 0 < sum(counting.calls) < 24


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path, images, vae, recipe, error):
    tight = Counting(vae, 2, error)
    report = built(images, tmp_path / "cache", tight, recipe, batch_size=10, shard_size=14)
    assert report.encoded == 12
    assert max(tight.calls) == 2
    assert sum(tight.calls) == 24
    latents = Latents.open(tmp_path / "cache", recipe)
    for i, path in enumerate(latents.paths):
        torch.testing.assert_close(latents[i, True][0], by_hand(vae, images / path, flip=True)[0], rtol=2e-3, atol=2e-3)
    with pytest.raises(GuidanceError, match=r"one image of data\.resolution = 64; lower the resolution, or encode on"):
        built(images, tmp_path / "none", Counting(vae, 0, error), recipe)


def test_other_errors_of_the_vae_are_not_taken_for_want_of_memory(tmp_path, images, vae, recipe):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        built(images, tmp_path / "cache", Counting(vae, 0, RuntimeError("mat1 and mat2")), recipe)


def test_a_vae_that_gives_nan_stops_the_run(tmp_path, images, vae, recipe):
    class Overflowing(Counting):
        def encode(self, x):
            found = super().encode(x).latent_dist
            mean = torch.where(x.mean((1, 2, 3), keepdim=True) > -0.25, float("inf"), found.mean)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=found.std))

    with pytest.raises(GuidanceError, match=r"NaN or infinite latents for 'b/photo\d\.jpg' in float32; encode in"):
        built(images, tmp_path / "cache", Overflowing(vae), recipe)
    assert built(images, tmp_path / "cache", vae, recipe).encoded == 12 - 8  # two shards were finished before


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(tmp_path, images, vae, recipe, monkeypatch):
    real = Path.write_bytes
    written = []

    def until_full(path, data):
        written.append(path)
        if len(written) == 2:
            real(path, data[: len(data) // 2])
            path = Path("/dev/full")  # the system's own error
        return real(path, data)

    folder = tmp_path / "cache"
    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(GuidanceError, match=r"shard-\w+\.safetensors' cannot be written: the disk is full; free some"):
        built(images, folder, vae, recipe)
    for path in find_shards(folder):
        read_shard(path)
    assert not list(folder.glob(".unfinished*"))
    with pytest.raises(GuidanceError, match=r"is unfinished; run `gcfg cache CONFIG` again"):
        Latents.open(folder, recipe)
    monkeypatch.undo()
    assert built(images, folder, vae, recipe).reused >= 4
    built(images, tmp_path / "whole", vae, recipe)
    assert content(folder) == content(tmp_path / "whole")


def test_a_killed_decoding_process_is_one_sentence(tmp_path, images, vae, recipe, monkeypatch):
    def killed(data):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decode, "read_image", killed)
    with pytest.raises(GuidanceError, match=r"decodes images was killed, .*; lower data\.workers"):
        built(images, tmp_path / "cache", vae, recipe, workers=1)


def test_ctrl_c_leaves_whole_shards_only(tmp_path, images, vae, recipe, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Interrupted(Counting):
        def encode(self, x):
            if len(self.calls) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        built(images, tmp_path / "cache", Interrupted(vae), recipe, workers=1)
    assert not list((tmp_path / "cache").glob(".unfinished*"))
    assert [len(read_shard(path).entries) for path in find_shards(tmp_path / "cache")] == [4]
    assert built(images, tmp_path / "cache", vae, recipe).reused == 4
    built(images, tmp_path / "whole", vae, recipe)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_the_vaes_fingerprint():
    vae = make_vae(1)
    name = vae_fingerprint(vae)
    assert len(name) == 64
    assert vae_fingerprint(make_vae(1)) == name
    assert vae_fingerprint(make_vae(1).half()) == name
    assert vae_fingerprint(make_vae(1).half().float().to(memory_format=torch.channels_last)) == name
    assert vae_fingerprint(make_vae(2)) != name
    assert vae_fingerprint(make_vae(1, scaling_factor=0.13025)) != name
    with torch.no_grad():
        vae.decoder.conv_out.weight += 1  # an exchanged decoder changes no latent
        assert vae_fingerprint(vae) == name
        vae.quant_conv.bias[0] += 0.01
        assert vae_fingerprint(vae) != name
    with pytest.raises(ValueError, match="bfloat16, expected float32 or float16"):
        vae_fingerprint(make_vae(1).bfloat16())


@pytest.fixture
def many(tmp_path):
    """Forty small images, three broken ones."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((digit * 255 / 16).astype(np.uint8)).save(folder / f"{number:02}.png")
    for number in (3, 20, 39):
        (folder / f"{number:02}.png").write_bytes(b"broken")
    return folder


def run_script(*arguments, launcher=()):
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def caching_process():
    spec = importlib.util.spec_from_file_location("caching_process", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kill_9_at_any_point_changes_nothing(tmp_path, many):
    """From a cache with kept, touched, changed, missing and new images, so that a run has every kind of work."""
    build = caching_process().build
    before = tmp_path / "before"
    for path in list(many.iterdir())[::3]:
        path.rename(tmp_path / path.name)
    build(many, before)
    for path in tmp_path.glob("*.png"):
        path.rename(many / path.name)  # new
    names = sorted(record.path for path in find_shards(before) for record in read_shard(path).entries)
    shutil.copy(many / names[1], many / names[0])  # changed
    os.utime(many / names[9])
    (many / names[14]).unlink()
    (many / names[15]).unlink()
    told = run_script("kill", many, before, *(tmp_path / f"killed{n}" for n in range(4)))
    print(told)
    kills = int(told.partition("kills: ")[2].split()[0])
    assert kills >= 5, told


def test_two_processes_make_the_files_of_one(tmp_path, many):
    caching_process().build(many, tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1")
    told = run_script("build", many, tmp_path / "two", launcher=launcher)
    assert told.count("CacheReport(encoded=37, reused=0, broken=3, shards=10") == 2
    shares = [int(line.split()[-1]) for line in told.splitlines() if line.startswith("encoded here")]
    assert sum(shares) == 2 * 37  # with flips, each once
    assert min(shares) >= 2 * 17  # half of the shards
    assert content(tmp_path / "two") == content(tmp_path / "one")
