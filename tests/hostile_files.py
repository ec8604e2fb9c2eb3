"""Model files that are damaged, odd or malicious, each by a name that says how; they take little disk.

A UNet in them is the small SD1.x of the tests in float16, whose weights are zeros that the file system does not store.
"""

import json
import math
import os
import pickle
import socket
import struct
from pathlib import Path

import torch
from comfyui_gcfg.testkit import layouts

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75}
BLOCK = "input_blocks.1.1.transformer_blocks.0"
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LONG = 100_000


def container(header, data=b""):
    """A safetensors file of a header, as a value or as the bytes themselves."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**changes):
    """A file of one good tensor 'a' but for the changes of its entry; None takes a part of it away."""
    entry = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return container({"a": entry}, bytes(8))


def two(begin, end, size=16):
    """A good tensor of 8 bytes, then one at these offsets."""
    return container({"a": GOOD, "b": {**GOOD, "data_offsets": [begin, end]}}, bytes(size))


def with_metadata(metadata):
    """A file of one good tensor and this metadata, as a value or as JSON."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return container(f'{{"__metadata__": {text}, "a": {json.dumps(GOOD)}}}'.encode(), bytes(8))


def headers():
    """Files whose header is none, or that are of another kind."""
    yield "empty", b""
    yield "seven bytes", b"\x02" + bytes(6)
    for length in (0, 1, 100_000_001, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", struct.pack("<Q", length) + b"{}"
    yield "header beyond the end", struct.pack("<Q", 50) + b"{}"
    yield "page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
    yield "gguf", b"GGUF\x03\0\0\0" + bytes(32)
    yield "gzip", b"\x1f\x8b\x08\0" + bytes(32)
    for name, raw in {
        "a list": b"[1,2]",
        "null": b"null",
        "a number": b"12",
        "a string": b'"ab"',
        "spaces": b"      ",
        "no tensors": b"{}",
        "not utf-8": b'{"a\xff": 1}',
        "byte order mark": b"\xef\xbb\xbf{}",
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "text behind it": b"{} and more",
        "python": b"{'a': None}",
        "deep list": b'{"a":' + b"[" * LONG + b"]" * LONG + b"}",
        "deep object": b'{"a":' * LONG + b"1" + b"}" * LONG,
        "deep metadata": b'{"__metadata__":{"a":' + b"[" * LONG + b"]" * LONG + b"}}",
        "same key twice": f'{{"a":{json.dumps(GOOD)},"a":{json.dumps(GOOD)}}}'.encode(),
        "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
        "entry with a part twice": b'{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}',
    }.items():
        yield f"header that is {name}", container(raw, bytes(8) if b"F32" in raw else b"")


def entries():
    """Files with one bad entry."""
    for name, entry in {"null": None, "a list": [1], "a number": 1, "a string": "F32"}.items():
        yield f"entry that is {name}", container({"a": entry})
    for key, values in {
        "dtype": ["F33", "", "f32", 5, ["F32"], "F6_E2M3", "\x1b[2J\nOK"],
        "shape": [2, "2", [2.0], ["2"], [True, 2], [-2], [-1, -2], [[2]], [2**63, 0], [10**30], [1] * LONG, {"0": 2}],
        "data_offsets": [0, [0], [0, 4, 8], ["0", "8"], [0.0, 8.0], [False, 8], [-8, 0], [8, 0], [0, 10**30], {}],
    }.items():
        yield f"entry without {key}", one(**{key: None})
        for value in values:
            yield f"entry with {key} {json.dumps(value)[:40]}", one(**{key: value})
    yield (
        "entry with a number of 5000 digits",
        container(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    )
    yield "entry with NaN", container(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8))
    yield "offsets too short for the shape", one(data_offsets=[0, 4])
    yield "offsets too long for the shape", one(shape=[1])
    yield "tensor beyond the end", one(shape=[2 * 10**9], data_offsets=[0, 8 * 10**9])
    yield "overlapping tensors", two(4, 12, 12)
    yield "two tensors in one place", two(0, 8, 8)
    yield "gap between tensors", two(12, 20, 20)
    yield "gap before the first tensor", container({"a": {**GOOD, "data_offsets": [8, 16]}}, bytes(16))
    yield "trailing bytes", container({"a": GOOD}, bytes(9))
    yield "trailing zip", container({"a": GOOD}, bytes(8) + b"PK\x03\x04" + bytes(40))


def metadata():
    """Files with odd metadata."""
    values = {"a list": [1], "a string": "x", "a number": 1, "of a number": {"a": 1}, "of null": {"a": None}}
    values |= {"of objects": {"a": {"b": "c"}}, "of a key twice": '{"a": "1", "a": "2"}', "null": None}
    values |= {"with half a character": {"a": "\ud83d"}, "of a key with half a character": {"\ud83d": "a"}}
    values |= {
        "with colours": {"a\x1b[31m": "\x1b[2J\x1b]0;x\x07"},
        "with lines": {"a": "1\nform   good", "b\nc": "\r"},
    }
    for name, value in values.items():
        yield f"metadata that is {name}", with_metadata(value)


def unets():
    """UNet files with odd tensors, keys or metadata."""
    yield "unet", unet()
    yield "ordinary unet", unet("ordinary")
    yield (
        "unet with metadata with colours",
        unet(metadata={"a\x1b[31m": "\x1b[2J\x1b]0;x\x07\u202e", "b\nform": "good\n"}),
    )
    yield "unet with 5 MB of metadata", unet(metadata={"a": "x" * 5_000_000})
    for width in ("-1", "0", "٣", "9" * 5000, "9999999999", "1e3"):
        yield f"compact unet with context_dim {width[:22]}", unet("compact", metadata={"gcfg.context_dim": width})
    yield "unet with half a character in a key", unet(add={"\ud83d": []})
    yield "unet with colours in a key", unet(add={"\x1b[31mred\n": [2]})
    yield "unet with an empty key", unet(add={"": [2]})
    yield "unet with a key of 1 MB", unet(add={"x" * 1_000_000: [2]})
    yield (
        "unet with lines in a block's name",
        unet(add={f"\nform ok.transformer_blocks.0.attn2.{k}": [2] for k in "ab"}),
    )
    yield "no unet, a key of 1 MB", container({"x" * 1_000_000: GOOD}, bytes(8))
    yield (
        "no unet, 20,000 keys",
        container({f"{i}": {**GOOD, "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}),
    )
    yield "unet of block 10^30", unet(add={f"input_blocks.1.1.transformer_blocks.{10**30}.attn2.to_q.weight": [2]})
    yield "unet of a block beyond all others", unet(add={"input_blocks.99999.0.in_layers.2.weight": [320, 320, 3, 3]})
    looked_at = (f"{BLOCK}.attn2.to_k.weight", f"{BLOCK}.attn2.to_v.weight", "input_blocks.1.1.proj_in.weight")
    looked_at += (f"{BLOCK}.norm1.weight", "input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight")
    looked_at += (
        "middle_block.0.in_layers.2.weight",
        f"{BLOCK}.attn2.to_out.0.bias",
        "input_blocks.1.0.in_layers.0.weight",
    )
    for key in looked_at:
        yield f"ordinary unet without {key}", unet("ordinary", drop=[key])
        yield f"folded unet without {key}", unet(drop=[key])
        for form, shape in (("ordinary", []), ("folded", [320]), ("ordinary", [320, 320, 1]), ("folded", [0])):
            yield f"{form} unet with {key} of shape {shape}", unet(form, shapes={key: shape})
    for key in (f"{BLOCK}.norm1.weight", "input_blocks.1.1.proj_in.weight", "input_blocks.0.0.weight"):
        for shape in ([], [4], [1, 1, 1, 1, 1, 1]):
            yield f"compact unet with {key} of shape {shape}", unet("compact", shapes={key: shape})
    for shape in ([], [1], [320, 1], [1, 1, 320, 1], [0]):
        yield (
            f"compact unet with a constant of shape {shape}",
            unet("compact", shapes={f"{BLOCK}.attn2.null_text_feature": shape}),
        )
    for shape in ([], [2816], [1280, 0], [1280, 2816, 1]):
        yield f"compact unet with label_emb of shape {shape}", unet("compact", add={"label_emb.0.0.weight": shape})
    for dtype in ("I64", "U8", "BOOL", "C64", "F4", "F8_E8M0", "U16", "F64"):
        yield f"unet of {dtype}", unet(dtype=dtype)
        yield f"unet with to_v of {dtype}", unet(dtypes={f"{BLOCK}.attn2.to_v.weight": dtype})
    for name, pattern in {"NaN": 0x7E00, "infinity": 0xFC00}.items():
        for key in ("out.2.bias", f"{BLOCK}.attn2.to_out.0.bias", f"{BLOCK}.attn2.to_v.weight"):
            yield f"unet with {name} in {key}", unet(values={key: struct.pack("<H", pattern)})
    yield "unet of F8_E4M3 with NaN in out.2.bias", unet(dtype="F8_E4M3", values={"out.2.bias": b"\x7f"})


def unet(form="folded", add=(), drop=(), shapes=(), dtype="F16", dtypes=(), values=(), metadata=None):
    """A UNet file as (its start, its size, bytes at places in it), to be written with a hole."""
    tensors = {key: list(shape) for key, shape in layouts.unet(layouts.FAMILIES["sd15"]).items()}
    if form == "compact":
        features = {
            f"{key.removesuffix('norm2.bias')}attn2.null_text_feature" for key in tensors if "norm2.bias" in key
        }
        tensors = {key: shape for key, shape in tensors.items() if ".attn2." not in key and ".norm2." not in key}
        tensors |= {key: [1, 1, 320] for key in features}
    tensors |= {**dict(add), **dict(shapes)}
    header, end = {"__metadata__": metadata} if metadata is not None else {}, 0
    for key, shape in tensors.items():
        if key in drop:
            continue
        of = dict(dtypes).get(key, dtype)
        size = int(math.prod(shape) * BYTES[of])
        header[key] = {"dtype": of, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    start = container(header)
    if form == "ordinary":
        values = {key: b"\x3c" for key in header if key.endswith("attn2.to_v.weight")} | dict(values)
    places = {
        len(start) + header[key]["data_offsets"][0]: value
        for key, value in dict(values).items()
        if math.prod(header[key]["shape"])
    }
    return start, len(start) + end, places


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def no_files(folder):
    """Names that are no regular file, or none that can be read; all are made with their reason for a name."""
    yield "missing", folder / "missing.safetensors"
    (folder / "folder.safetensors").mkdir()
    yield "folder", folder / "folder.safetensors"
    yield "file as a folder", folder / "unet.safetensors" / "x.safetensors"
    yield "name of 300 letters", folder / f"{'x' * 300}.safetensors"
    if os.name == "nt":
        return
    os.mkfifo(folder / "pipe.safetensors")
    yield "pipe", folder / "pipe.safetensors"
    links = {"dangling": "nowhere", "loop": "loop.safetensors", "device": "/dev/zero", "to a folder": "."}
    links["whose reading fails"] = "/proc/self/mem"
    for name, target in links.items():
        path = folder / f"{name if name == 'loop' else 'link ' + name}.safetensors"
        path.symlink_to(target)
        yield f"link {name}", path
    place = folder / "socket.safetensors"
    here = os.getcwd()
    os.chdir(folder)  # a socket's name may have 108 letters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place.name)
    os.chdir(here)
    yield "socket", place


def pickles(folder):
    """Pickles under all endings; the bombs make a folder 'exploded' beside them when they are opened carelessly."""
    harmless, bomb = {"state_dict": {"a": torch.ones(2)}}, {"state_dict": Bomb(folder / "exploded")}
    for name, content, zipped in (
        ("$(touch exploded).ckpt", harmless, True),
        ("`touch exploded`;touch exploded.pt", harmless, False),
        ("bomb.ckpt", bomb, True),
        ("bomb.pth", bomb, False),
        ("renamed bomb.safetensors", bomb, True),
        ("renamed old bomb.safetensors", bomb, False),
    ):
        torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
        yield name, folder / name
    (folder / "bare.bin").write_bytes(pickle.dumps(bomb["state_dict"], protocol=0))
    yield "bare.bin", folder / "bare.bin"


def write_hostile_files(folder: Path) -> dict[str, Path]:
    """Write all of them into a folder; return their paths by name."""
    written = {}
    for number, (name, content) in enumerate([*headers(), *entries(), *metadata(), *unets()]):
        stem = "unet" if name == "unet" else f"{number:03}"
        start, size, places = content if isinstance(content, tuple) else (content, len(content), {})
        with (folder / f"{stem}.safetensors").open("wb") as file:
            file.write(start)
            file.truncate(size)
            for place, value in places.items():
                file.seek(place)
                file.write(value)
        assert name not in written, name
        written[name] = Path(file.name)
    (folder / "colours\x1b[31m\nline.safetensors").write_bytes(written["unet"].read_bytes()[:8])
    written["name with colours and lines"] = folder / "colours\x1b[31m\nline.safetensors"
    return written | dict(no_files(folder)) | dict(pickles(folder))
