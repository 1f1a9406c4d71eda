"""Whatever interrupts a push, the next one finishes it, and card and weights never disagree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from hub_faults import FaultPlan, random_plan
from hub_server import LoopbackHub, serve
from hub_store import Commit
from pushing import TOKEN, checkpoint

from dllm_convert.common.manifest import MANIFEST_FILE, git_blob, hash_files

SCHEDULES = 208
GROUPS = 8
PROGRAM = Path(__file__).with_name("pushing_alone.py")


class Client:
    """Forks pushes out of one warm process."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        self.environment = hub.environment(home, TOKEN) | {"OMP_NUM_THREADS": "1"}
        self.log = home.with_name("client.log")
        self.pid = 0
        self.started = threading.Event()

    def push(self, folder: Path, repo_id: str, *, create_pr: bool) -> int:
        self.started.clear()
        process = forks.start(
            [sys.executable, str(PROGRAM), str(folder), repo_id, str(create_pr)],
            env=self.environment,
            modules=forks.CLIENT,
            before=[("faults:plant", {"hurry": True})],
            log=self.log,
        )
        self.pid = process.pid
        self.started.set()
        return process.wait(60)

    def kill(self) -> None:
        assert self.started.wait(30)
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def versions(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return two checkpoints of one base whose weights, card and number of shards differ."""
    root = tmp_path_factory.mktemp("versions")
    old = source_cache("llama", shards=3)
    base = root / "base" / old.name
    shutil.copytree(old, base)
    first = checkpoint(base, root / "first", "bd3lm")
    shutil.rmtree(base)
    shutil.copytree(source_cache("llama", seed=7), base)
    return first, checkpoint(base, root / "second", "mdlm")


def check_consistent(commit: Commit) -> None:
    """Every commit holds a whole publication or none: card, manifest and weights of one run."""
    if MANIFEST_FILE not in commit.files:
        assert set(commit.files) <= {".gitattributes"}
        return
    manifest = json.loads(commit.files[MANIFEST_FILE].read())
    for name, digest in manifest["files"].items():
        assert commit.files[name].sha256 == digest, name
    assert commit.files["README.md"].oid == manifest["card"]["blob"]
    listed = {*manifest["files"], MANIFEST_FILE, "README.md", ".gitattributes"}
    assert set(commit.files) == listed


def publish_directly(hub: LoopbackHub, repo_id: str, folder: Path) -> None:
    """Put an earlier version there without a client."""
    repo = hub.store.create(repo_id, private=True, author="me")
    files = {}
    for path in folder.iterdir():
        if path.is_file():
            copy = hub.store.new_file()
            shutil.copyfile(path, copy)
            from hub_store import Blob

            lfs = hub.mode == "lfs" and path.suffix == ".safetensors"
            files[path.name] = Blob.of(copy, lfs=lfs)
            if lfs:
                hub.store.objects[files[path.name].sha256] = files[path.name]
    hub.store.commit(repo, "main", files, "first version", "me")


def one_schedule(
    seed: int, hub: LoopbackHub, pusher: Client, versions: tuple[Path, Path], folder: Path
) -> None:
    repo_id, create_pr = f"me/model-{seed}", seed % 4 == 3
    first, second = versions
    shutil.copytree(second, folder)
    if seed % 2 or create_pr:
        publish_directly(hub, repo_id, first)
    before = hash_files(folder)
    hub.faults = FaultPlan(random_plan(seed), kill=pusher.kill)
    codes = [pusher.push(folder, repo_id, create_pr=create_pr)]
    while codes[-1] != 0 and len(codes) < 6:
        assert codes[-1] in (1, -signal.SIGKILL), (seed, codes, hub.faults.happened)
        hub.add_user("me", TOKEN)
        codes.append(pusher.push(folder, repo_id, create_pr=create_pr))
    what = (seed, codes, hub.faults.happened)
    assert codes[-1] == 0, what
    assert hash_files(folder) == before, what
    repo = hub.store.repos[repo_id]
    for commit in repo.commits.values():
        check_consistent(commit)
    revision = "refs/pr/1" if create_pr else "main"
    final = repo.find(revision)
    assert final is not None, what
    manifest = json.loads(final.files[MANIFEST_FILE].read())
    wanted = json.loads((second / MANIFEST_FILE).read_text())
    assert manifest["files"] == wanted["files"], what
    assert manifest["plan"]["target"] == "mdlm", what
    assert [pull.status for pull in repo.pulls] == (["open"] if create_pr else []), what
    assert git_blob(second / "modeling_dllm.py") == final.files["modeling_dllm.py"].oid


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_faults_end_in_a_consistent_repository(
    group: int, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    hub = LoopbackHub(tmp_path / "hub", mode=("lfs", "regular")[group % 2])
    struck = 0
    with serve(hub):
        pusher = Client(hub, tmp_path / "home")
        for seed in range(group, SCHEDULES, GROUPS):
            hub.add_user("me", TOKEN)
            folder = tmp_path / f"checkpoint-{seed}"
            one_schedule(seed, hub, pusher, versions, folder)
            struck += len(hub.faults.happened)
            shutil.rmtree(folder)
    # A schedule whose place is never reached tests nothing; most must strike.
    assert struck >= SCHEDULES / GROUPS / 2
    assert all(s.token is None for s in hub.seen if s.host == "localhost")
