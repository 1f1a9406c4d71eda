"""The push command against a loopback Hub, with the real client in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_faults import Fault, FaultPlan
from hub_server import LoopbackHub, serve
from pushing import TOKEN, Done, checkpoint, command

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.verification.bytes import verify_folder

REPO = "me/tiny"


@pytest.fixture(scope="module")
def original(source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(source_cache("llama"), tmp_path_factory.mktemp("pushed") / "checkpoint")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture(params=["lfs"])
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path / "hub", mode=request.param)
    hub.add_user("me", TOKEN, orgs=("team",))
    with serve(hub):
        yield hub


@pytest.fixture
def push(hub: LoopbackHub, folder: Path, tmp_path: Path) -> Callable[..., Done]:
    def run(*arguments: str, repo_id: str = REPO, **options: Any) -> Done:
        return command(hub, tmp_path / "home", "push", str(folder), repo_id, *arguments, **options)

    return run


def change(folder: Path, **fields: Any) -> None:
    write_manifest(folder, read_manifest(folder) | fields)


def head(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    commit = hub.store.repos[REPO].find(revision)
    assert commit is not None
    return {name: blob.read() for name, blob in commit.files.items()}


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: "), done.stderr
    for word in words:
        assert word in error, error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("hub", ["lfs", "regular"], indirect=True)
def test_publish_and_publish_again(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    before = hash_files(folder)
    first = push("--json", HF_DEBUG="1")
    assert first.code == 0, first.stderr
    result = first.json
    assert result["private"] is True
    assert set(result["uploaded"]) == set(before)
    probes = {probe["name"]: probe["passed"] for probe in result["confirmed"]["probes"]}
    # What compares with the base is not measured: a stranger has the repository alone.
    compared = {"special-tokens", "chat-template"}
    assert {name for name, passed in probes.items() if not passed} == compared
    assert False not in probes.values()
    assert {"portable", "portable-stock"} <= {name for name, passed in probes.items() if passed}
    history = hub.store.repos[REPO].history()
    assert [commit.message for commit in history] == ["Add tiny", "initial commit"]
    assert history[0].oid == result["commit"]
    published = head(hub)
    assert json.loads(published[MANIFEST_FILE])["files"] == read_manifest(folder)["files"]
    assert 'checkpoint = "me/tiny"' in published["README.md"].decode()
    assert hash_files(folder) == before
    assert not any(".work" in name for name in published)

    received = len(hub.seen)
    second = push("--json")
    assert second.json["uploaded"] == []
    assert second.json["commit"] == result["commit"]
    assert len(hub.store.repos[REPO].history()) == 2
    assert max(s.size for s in hub.seen[received:] if s.method in ("PUT", "POST")) < 100_000

    # Nothing printed a token, and the storage host never saw one.
    for done in (first, second):
        assert TOKEN not in done.stdout + done.stderr
    assert all(s.token is None for s in hub.seen if s.host == "localhost")
    assert any(s.host == "localhost" for s in hub.seen) == (hub.mode == "lfs")
    assert {s.token for s in hub.seen if s.host == "127.0.0.1"} == {TOKEN}


def test_not_logged_in(push: Callable[..., Done]) -> None:
    refused(push(token=None), 1, "not logged in", "hf auth login", "HF_TOKEN")


def test_a_wrong_token_is_named_and_never_shown(push: Callable[..., Done]) -> None:
    wrong = "hf_thistokenisnotanyones"
    done = push("--json", token=wrong)
    refused(done, 1, "access token", "hf auth login")
    assert wrong not in done.stdout + done.stderr
    assert done.json["error"]["kind"] == "HubError"


def test_no_rights(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    refused(push(repo_id="somebody/tiny"), 1, "no rights", "write access")
    hub.add_user("me", TOKEN, write=False)
    refused(push(), 1, "no rights", "write access")


def test_an_organisation_of_the_user_and_a_name_alone(
    hub: LoopbackHub, push: Callable[..., Done]
) -> None:
    hub.faults = FaultPlan([Fault("status", "POST", "preupload", n, 403) for n in range(1, 9)])
    push(repo_id="team/tiny")
    push(repo_id="alone")
    assert {"team/tiny", "me/alone"} <= set(hub.store.repos)


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/bad name", "-me/x"])
def test_an_id_the_hub_would_refuse(push: Callable[..., Done], repo_id: str) -> None:
    done = push(repo_id=repo_id)
    assert done.code in (1, 2) and "Traceback" not in done.stderr


def test_foreign_content_is_left_alone(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    repo = hub.store.create(REPO, private=True)
    theirs = {"pytorch_model.bin": hub.store.add_bytes(b"precious")}
    hub.store.commit(repo, "main", theirs, "theirs")
    refused(push(), 1, "pytorch_model.bin", "Give another repository")
    refused(push("--create-pr"), 1, "pytorch_model.bin")
    assert set(head(hub)) == {".gitattributes", "pytorch_model.bin"}


def test_a_conversion_of_another_base_is_left_alone(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    repo = hub.store.create(REPO, private=True)
    other = {"source": {"repo_id": "someone/other"}, "files": {}}
    files = {MANIFEST_FILE: hub.store.add_bytes(json.dumps(other).encode())}
    hub.store.commit(repo, "main", files, "another model")
    refused(push(), 1, "a conversion of someone/other, not of")


@pytest.mark.parametrize(
    ("verification", "words"),
    [
        (None, "never verified"),
        (
            {
                "passed": False,
                "seconds": 1.0,
                "probes": [
                    {
                        "name": "attention-sdpa",
                        "passed": False,
                        "measured": "7 of 720 pairs wrong",
                        "required": "0",
                        "detail": "",
                    }
                ],
            },
            "failed its verification",
        ),
    ],
)
def test_what_is_not_verified_is_not_published(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done], verification: Any, words: str
) -> None:
    change(folder, verification=verification)
    refused(push(), 4, words, "--force-unverified")
    assert REPO not in hub.store.repos
    hub.faults = FaultPlan([Fault("status", "HEAD", "/resolve/", n, 404) for n in range(1, 9)])
    push("--force-unverified")
    body = head(hub)["README.md"].decode().split("---\n", 2)[2].strip().splitlines()
    assert body[0] == "# tiny"
    assert body[2].startswith("> **Not verified" if verification is None else "> **Verification")


def test_what_was_verified_by_its_files_says_so(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    """A model that was never run is not loaded for the proof either: it may fit no memory."""
    report = verify_folder(folder, None, Reporter(quiet=True)).as_dict()
    assert report["passed"]
    change(folder, verification=report)
    done = push("--json")
    assert done.code == 0, done.stderr
    assert "its model was never run" in done.stderr
    assert "> **The model was never run.**" in head(hub)["README.md"].decode()
    assert "without loading the model" in head(hub)["README.md"].decode()
    names = {probe["name"]: probe["passed"] for probe in done.json["confirmed"]["probes"]}
    assert names == {"weights": True, "mask-row": True}


def test_a_persons_card_is_kept_unless_told_otherwise(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    repo = hub.store.create(REPO, private=True)
    text = b"---\nlicense: mit\n---\n# Written by hand\n"
    hub.store.commit(repo, "main", {"README.md": hub.store.add_bytes(text)}, "my card")
    kept = push("--json")
    assert kept.code == 0, kept.stderr
    assert head(hub)["README.md"] == text
    assert kept.json["card_kept"] is True and "--overwrite-card" in kept.stderr
    replaced = push("--json", "--overwrite-card")
    assert replaced.json["uploaded"] == ["README.md"]
    assert head(hub)["README.md"].decode().count("# tiny") == 1


def test_a_card_edited_in_the_folder_is_published_and_checked(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    card = folder / "README.md"
    generated = card.read_text()
    card.write_text(generated.replace("license: apache-2.0", "licence: apache-2.0"))
    refused(push(), 1, "'licence' is not a key")
    assert REPO not in hub.store.repos
    card.write_text(generated + "\n## Mine\n\nA word of my own.\n")
    assert push().code == 0
    assert "A word of my own." in head(hub)["README.md"].decode()


def test_a_changed_file_and_a_strange_one_stay_here(
    folder: Path, push: Callable[..., Done]
) -> None:
    (folder / ".env").write_text("SECRET=1")
    (folder / "optimizer.pt").write_text("x")
    refused(push(), 1, "optimizer.pt", "manifest does not list")
    (folder / "optimizer.pt").unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"is_causal": false', '"is_causal": true '))
    refused(push(), 1, "config.json", "was changed after it was verified")


def test_a_branch_and_a_wrong_revision(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    done = push("--json", "--revision", "trial", "--commit-message", "A trial", "--public")
    assert done.code == 0, done.stderr
    repo = hub.store.repos[REPO]
    assert repo.private is False
    assert [c.message for c in repo.history("trial")] == ["A trial", "initial commit"]
    assert len(repo.history()) == 1
    refused(push("--revision", "refs/pr/99"), 1, "no revision 'refs/pr/99'")


def test_a_pull_request_is_gone_on_with(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    hub.faults = FaultPlan([Fault("status", "POST", "/commit/", n, 500) for n in range(1, 60)])
    refused(push("--create-pr"), 1, "HTTP 500", "Try again later")
    assert [pull.status for pull in hub.store.repos[REPO].pulls] == ["draft"]
    hub.faults = FaultPlan()
    done = push("--create-pr", "--json")
    assert done.json["pull_request"].endswith("/me/tiny/discussions/1")
    assert [pull.status for pull in hub.store.repos[REPO].pulls] == ["open"]
    assert MANIFEST_FILE in head(hub, "refs/pr/1") and MANIFEST_FILE not in head(hub)


def test_somebody_who_always_commits_first(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    hub.faults = FaultPlan([Fault("stale", "POST", "/commit/", n) for n in range(1, 40)])
    refused(push(), 1, "was changed by somebody else", "run the same command again")
    assert MANIFEST_FILE not in head(hub)
    hub.faults = FaultPlan([Fault("stale", "POST", "/commit/", 1)])
    done = push("--json")
    assert done.code == 0, done.stderr
    assert "somebody else" in [commit.message for commit in hub.store.repos[REPO].history()]


def test_visibility_of_a_repository_is_not_changed(
    hub: LoopbackHub, push: Callable[..., Done]
) -> None:
    hub.store.create(REPO, private=False)
    refused(push("--private"), 1, "exists and is public", "hf repos settings")
    hub.store.repos[REPO].private = True
    hub.quota = 1
    assert "stays private" in push("--public").stderr


def test_no_room(hub: LoopbackHub, push: Callable[..., Done]) -> None:
    hub.quota = 1000
    refused(push(), 1, "no room", "storage limit")


def test_offline(push: Callable[..., Done]) -> None:
    refused(push(HF_HUB_OFFLINE="1"), 1, "cannot reach the Hub", "HF_HUB_OFFLINE")


def test_bytes_that_arrive_changed_are_found_out(
    hub: LoopbackHub, push: Callable[..., Done]
) -> None:
    hub.faults = FaultPlan([Fault("corrupt", "GET", r"/resolve/.*config.json")])
    refused(push(), 1, "config.json", "differs from what was sent")
    assert push().code == 0


def test_llama_licences_name_the_model(
    hub: LoopbackHub, folder: Path, push: Callable[..., Done]
) -> None:
    source = read_manifest(folder)["source"] | {"license": "llama3.2"}
    change(folder, source=source)
    refused(push(), 3, "begin with 'Llama'", "me/Llama-tiny")
    assert REPO not in hub.store.repos


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-shard-size", "five"], "'five' is not a size"),
        (["--create-pr", "--revision", "x"], "--create-pr or --revision"),
    ],
)
def test_usage(push: Callable[..., Done], arguments: list[str], words: str) -> None:
    done = push(*arguments)
    assert done.code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_smaller_shards(hub: LoopbackHub, folder: Path, push: Callable[..., Done]) -> None:
    done = push("--json", "--max-shard-size", "40KB")
    assert done.code == 0, done.stderr
    published = head(hub)
    shards = [name for name in published if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors" not in shards
    assert all(len(published[name]) < 60_000 for name in shards)
    assert (folder / "model.safetensors").exists()
    back = push("--json")
    assert set(back.json["deleted"]) == {*shards, "model.safetensors.index.json"}
    assert "model.safetensors" in head(hub)
