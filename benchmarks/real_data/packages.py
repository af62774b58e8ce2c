"""The packages that the pairs come from: downloaded once by npm and apt-get, checked, and read without unpacking."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from open_clip_train_fastclip.errors import UserError

FETCHERS = {"npm": "npm", "debian": "apt-get"}


@dataclass(frozen=True)
class Package:
    """One version of a package, known by the sha256 of its file."""

    registry: str  # "npm" or "debian"
    name: str
    version: str
    megabytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """As npm and apt-get name the file that they download."""
        if self.registry == "npm":
            return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"

    @property
    def label(self) -> str:
        """The package as its registry's tools write it."""
        return f"{self.name}@{self.version}" if self.registry == "npm" else f"{self.name}={self.version}"


PACKAGES = [Package(**facts) for facts in json.loads(Path(__file__).with_suffix(".json").read_text())]
ICONIFY, EMOJIBASE, OPENMOJI, LUCIDE, TABLER, MDI, PHOSPHOR, FONT_AWESOME, OPENCLIPART, TUXPAINT = PACKAGES


def fetch(folder: Path) -> None:
    """Downloads what `folder` lacks of PACKAGES and checks every file.

    Raises UserError where npm or apt-get is missing, fails or brings something else, and for a file in `folder` that
    is not the package it is named after.
    """
    folder = folder.resolve()  # apt-get takes a relative folder for one of the system's
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder for the packages")
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path = folder / package.file_name
        if path.is_file() and _sha256(path) != package.sha256:
            raise UserError(f"{path} is not the package {package.label}: remove it, it is downloaded again")
    missing = [package for package in PACKAGES if not (folder / package.file_name).is_file()]
    bar = tqdm(total=sum(p.megabytes for p in missing), desc="downloading packages", unit="MB", disable=None)
    for package in missing:
        _download(package, folder)
        bar.update(package.megabytes)
        if bar.disable:
            print(f"{package.label}: {package.megabytes} MB downloaded", flush=True)
    bar.close()


def _download(package: Package, folder: Path) -> None:
    tool = FETCHERS[package.registry]
    otherwise = f"or put {package.file_name} into {folder} by other means"
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is missing, which downloads {package.label}: install it, {otherwise}")
    # Beside the files, so that an interrupted download is never taken for a package
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for command in _npm(package) if package.registry == "npm" else _apt(package, temporary):
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
                raise UserError(f"{' '.join(command)} failed: {' '.join(last)}: mend that, {otherwise}")
        path = Path(temporary, package.file_name)
        if not path.is_file() or _sha256(path) != package.sha256:
            raise UserError(f"{tool} brought another file than the one known as {package.label}: {otherwise}")
        path.rename(folder / package.file_name)


def _npm(package):
    return [["npm", "pack", package.label]]


def _apt(package, folder):
    # Lists of its own: those of the system may be missing, and only root can fetch them.
    for name in ("lists", "cache/archives"):
        Path(folder, name, "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
    return [["apt-get", *own, "update"], ["apt-get", *own, "download", package.label]]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def members(folder: Path, package: Package, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """(path inside the package, content) of its regular files whose path is `wanted`, in the package's order."""
    path = folder / package.file_name
    if package.registry == "npm":
        with tarfile.open(path) as tar:
            yield from _files(tar, wanted)
        return
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb is missing, which reads {path}: install it (the package is called dpkg)")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield from _files(tar, wanted)


def _files(tar, wanted):
    for entry in tar:
        if entry.isfile() and wanted(entry.name):
            yield entry.name, tar.extractfile(entry).read()
