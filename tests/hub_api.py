"""What the loopback Hub answers: every endpoint that publishing and reading a model uses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml
from hub_store import MAIN, Blob, Commit, PullRequest, Repo

if TYPE_CHECKING:
    from hub_server import LoopbackHub, User

BAD_TOKEN = "Invalid credentials in Authorization header"
PAGE = 50


@dataclass
class Answer:
    """A response; `file` is (path, first byte, one past the last) of a body that lies on disk."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: tuple[Path, int, int] | None = None

    @property
    def length(self) -> int:
        return self.file[2] - self.file[1] if self.file else len(self.body)

    def pieces(self, size: int) -> Iterator[bytes]:
        if self.file is None:
            yield self.body
            return
        path, start, end = self.file
        with path.open("rb") as handle:
            handle.seek(start)
            while start < end:
                piece = handle.read(min(size, end - start))
                start += len(piece)
                yield piece

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        content = {"Content-Type": "application/json", **headers}
        return cls(status, json.dumps(value).encode(), content)

    @classmethod
    def error(cls, status: int, code: str | None, message: str) -> Answer:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls.json({"error": message}, status, **headers, **{"Retry-After": "0"})


class Refusal(Exception):
    """An error that ends a request."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.answer = Answer.error(status, code, message)


@dataclass(frozen=True)
class Asked:
    """A request that was read."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    token: str | None
    headers: Mapping[str, str]
    body: bytes | Path

    @property
    def data(self) -> Any:
        assert isinstance(self.body, bytes)
        return json.loads(self.body or b"{}")


def answer(hub: LoopbackHub, asked: Asked) -> Answer:
    """Answer one request."""
    known = hub.users.get(asked.token or "")
    if hub.bad_token or (asked.token and hub.users and known is None):
        return Answer.error(401, None, BAD_TOKEN)
    with hub.store.lock:
        for method, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, asked.path)
            if found and asked.method in method.split():
                try:
                    return handle(hub, asked, known, **found.groupdict())
                except Refusal as refusal:
                    return refusal.answer
    if asked.path.startswith("/api/models/"):
        return Answer.error(404, "RepoNotFound", "Repository not found")
    return Answer.error(404, None, f"no such endpoint: {asked.method} {asked.path}")


def _repo(hub: LoopbackHub, user: User | None, repo_id: str) -> Repo:
    repo = hub.find(repo_id)
    hidden = repo is not None and repo.private and not _may_see(user, repo_id)
    if repo is None or hidden:
        raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
    if repo_id in hub.gated:
        raise Refusal(403, "GatedRepo", f"Access to model {repo_id} is restricted")
    return repo


def _may_see(user: User | None, repo_id: str) -> bool:
    return user is not None and repo_id.partition("/")[0] in (user.name, *user.orgs)


def _writable(hub: LoopbackHub, user: User | None, repo_id: str) -> Repo:
    repo = _repo(hub, user, repo_id)
    if user is None:
        raise Refusal(401, None, BAD_TOKEN)
    if not user.write or not _may_see(user, repo_id):
        raise Refusal(403, None, "You don't have the rights to write to this repository")
    return repo


def _at(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def _whoami(hub: LoopbackHub, asked: Asked, user: User | None) -> Answer:
    if user is None:
        return Answer.error(401, None, "Invalid username or password.")
    orgs = [{"name": org} for org in user.orgs]
    return Answer.json({"type": "user", "name": user.name, "orgs": orgs, "auth": {}})


def _create(hub: LoopbackHub, asked: Asked, user: User | None) -> Answer:
    if user is None:
        return Answer.error(401, None, BAD_TOKEN)
    data = asked.data
    namespace = data.get("organization") or user.name
    repo_id = f"{namespace}/{data['name']}"
    if not user.write or namespace not in (user.name, *user.orgs):
        message = f"You don't have the rights to create a model under the namespace {namespace!r}"
        return Answer.error(403, None, message)
    body = {"url": f"{hub.endpoint}/{repo_id}", "id": repo_id}
    if hub.find(repo_id) is not None:
        return Answer.json(body | {"error": "You already created this model repo"}, 409)
    private = data.get("visibility") == "private" or data.get("private") is True
    hub.store.create(repo_id, private=private, author=user.name)
    return Answer.json(body)


def _validate(hub: LoopbackHub, asked: Asked, user: User | None) -> Answer:
    content = asked.data["content"]
    found = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
    errors = []
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        data, errors = {}, [f"YAML: {error}"]
    ids = r"[\w.-]+(/[\w.-]+)?"
    bases = data.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(ids, str(base)):
            errors.append(f'"base_model" {base!r} must be a model id of the Hub')
    relation = data.get("base_model_relation", "finetune")
    if relation not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not isinstance(data.get("license", ""), str):
        errors.append('"license" must be a string')
    if "model-index" in data and not (data["model-index"] or [{}])[0].get("name"):
        errors.append('"model-index[0].name" is required')
    messages = [{"message": message} for message in errors]
    return Answer.json({"errors": messages, "warnings": []}, 400 if errors else 200)


def _preupload(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str) -> Answer:
    found = _writable(hub, user, repo)
    commit = _at(found, rev)
    modes = []
    for file in asked.data["files"]:
        weights = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
        mode = "lfs" if weights and hub.mode == "lfs" else "regular"
        blob = commit.files.get(file["path"])
        oid = None if blob is None else blob.sha256 if blob.lfs else blob.oid
        modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer.json({"files": modes})


def _batch(hub: LoopbackHub, asked: Asked, user: User | None, repo: str) -> Answer:
    _writable(hub, user, repo)
    objects = asked.data["objects"]
    used = sum(blob.size for blob in hub.store.objects.values())
    if hub.quota is not None and used + sum(o["size"] for o in objects) > hub.quota:
        return Answer.error(403, None, "Private repository storage limit reached")
    entries = []
    for wanted in objects:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.store.objects:
            entry["actions"] = _actions(hub, wanted)
        entries.append(entry)
    return Answer.json({"transfer": "basic", "objects": entries})


def _actions(hub: LoopbackHub, wanted: Mapping[str, Any]) -> dict[str, Any]:
    oid, size = wanted["oid"], wanted["size"]
    href = f"{hub.storage}/lfs/{oid}"
    upload: dict[str, Any] = {"href": href, "header": {}}
    if size > hub.part_size:
        count = -(-size // hub.part_size)
        parts = {str(n): f"{href}?part={n}" for n in range(1, count + 1)}
        upload = {
            "href": f"{hub.storage}/lfs/complete/{oid}",
            "header": {"chunk_size": str(hub.part_size), **parts},
        }
    return {"upload": upload, "verify": {"href": f"{hub.endpoint}/lfs/verify"}}


def _put(hub: LoopbackHub, asked: Asked, user: User | None, oid: str) -> Answer:
    assert isinstance(asked.body, Path)
    if "part" in asked.query:
        number = int(asked.query["part"][0])
        hub.parts[oid, number] = asked.body
        return Answer(200, headers={"ETag": f'"part-{number}"'})
    return _keep(hub, oid, asked.body)


def _keep(hub: LoopbackHub, oid: str, path: Path) -> Answer:
    blob = Blob.of(path, lfs=True)
    if blob.sha256 != oid:
        return Answer.error(422, None, "sha256 of the content does not match")
    hub.store.objects[oid] = blob
    return Answer(200)


def _complete(hub: LoopbackHub, asked: Asked, user: User | None, oid: str) -> Answer:
    path = hub.store.new_file()
    with path.open("wb") as out:
        for part in asked.data["parts"]:
            out.write(hub.parts.pop((oid, part["partNumber"])).read_bytes())
    return _keep(hub, oid, path)


def _verify(hub: LoopbackHub, asked: Asked, user: User | None) -> Answer:
    blob = hub.store.objects.get(asked.data["oid"])
    return Answer(200 if blob and blob.size == asked.data["size"] else 404)


def _commit(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str) -> Answer:
    found = _writable(hub, user, repo)
    assert isinstance(asked.body, bytes) and user is not None
    lines = [json.loads(line) for line in asked.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = _at(found, rev)
    if header.get("parentCommit") not in (None, head.oid):
        return Answer.error(412, None, "A commit has happened since. Please refresh and try again.")
    changes: dict[str, Blob | None] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            changes[value["path"]] = hub.store.add_bytes(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            blob = hub.store.objects.get(value["oid"])
            if blob is None:
                message = f"Your push was rejected: LFS pointer {value['path']} has no object"
                return Answer.error(400, None, message)
            changes[value["path"]] = blob
        elif line["key"] == "deletedFile":
            changes[value["path"]] = None
    made = hub.store.commit(found, rev, changes, header["summary"], user.name)
    url = f"{hub.endpoint}/{repo}/commit/{made.oid}"
    return Answer.json({"success": True, "commitOid": made.oid, "commitUrl": url})


def _discuss(hub: LoopbackHub, asked: Asked, user: User | None, repo: str) -> Answer:
    found = _repo(hub, user, repo) if asked.method == "GET" else _writable(hub, user, repo)
    if asked.method == "GET":
        author = (asked.query.get("author") or [None])[0]
        shown = [_details(repo, p) for p in found.pulls if author in (None, p.author)]
        return Answer.json({"discussions": shown, "count": len(shown), "start": 0})
    assert user is not None
    pull = PullRequest(len(found.pulls) + 1, asked.data["title"], user.name)
    found.pulls.append(pull)
    found.refs[pull.ref] = found.refs[MAIN]
    return Answer.json({"num": pull.num})


def _details(repo_id: str, pull: PullRequest) -> dict[str, Any]:
    return {
        "title": pull.title,
        "num": pull.num,
        "status": pull.status,
        "createdAt": "2026-11-23T12:00:00.000Z",
        "author": {"name": pull.author},
        "repo": {"name": repo_id, "type": "model"},
        "isPullRequest": True,
        "events": [],
        "changes": {"base": "refs/heads/main"},
        "filesWithConflicts": [],
        "numComments": 1,
        "repoOwner": {"name": repo_id.partition("/")[0]},
        "topReactions": [],
        "numReactionUsers": 0,
        "pinned": False,
    }


def _discussion(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, num: str) -> Answer:
    found = _repo(hub, user, repo)
    pull = next((p for p in found.pulls if p.num == int(num)), None)
    if pull is None:
        return Answer.error(404, None, "no such discussion")
    return Answer.json(_details(repo, pull))


def _status(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, num: str) -> Answer:
    found = _writable(hub, user, repo)
    pull = next(p for p in found.pulls if p.num == int(num))
    pull.status = asked.data["status"]
    event = {
        "id": "1",
        "type": "status-change",
        "createdAt": "2026-11-23T12:00:00.000Z",
        "author": {"name": pull.author},
        "data": {"status": pull.status},
    }
    return Answer.json({"newStatus": event})


def _branch(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, name: str) -> Answer:
    found = _writable(hub, user, repo)
    if name in found.refs:
        return Answer.error(409, None, "Reference already exists")
    found.refs[name] = found.refs[MAIN]
    return Answer(200)


def _info(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str = MAIN) -> Answer:
    found = _repo(hub, user, repo)
    commit = _at(found, rev)
    return Answer.json(
        {
            "id": repo,
            "sha": commit.oid,
            "private": found.private,
            "gated": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            "cardData": _card_data(commit),
        }
    )


def _card_data(commit: Commit) -> Any:
    readme = commit.files.get("README.md")
    found = re.match(rb"---\n(.*?\n)---\n", readme.read(), re.DOTALL) if readme else None
    return yaml.safe_load(found[1]) if found else {"license": "apache-2.0"}


def _tree(
    hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str, name: str | None
) -> Answer:
    found = _repo(hub, user, repo)
    commit = _at(found, rev)
    start = int((asked.query.get("cursor") or ["0"])[0])
    folder = f"{name}/" if name else ""
    names = sorted(path for path in commit.files if path.startswith(folder))
    if name and not names:
        return Answer.error(404, "EntryNotFound", f"{name} does not exist")
    entries: list[dict[str, Any]] = []
    if (asked.query.get("recursive") or ["true"])[0].lower() == "false":
        folders = {
            path[: path.index("/", len(folder))] for path in names if "/" in path[len(folder) :]
        }
        entries += [{"type": "directory", "path": p, "oid": commit.oid} for p in sorted(folders)]
        names = [path for path in names if "/" not in path[len(folder) :]]
    for path in names[start : start + PAGE]:
        blob = commit.files[path]
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": blob.size,
            "oid": blob.oid,
        }
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        entries.append(entry)
    more = {}
    if start + PAGE < len(names):
        url = f"{hub.endpoint}{asked.path}?recursive=true&cursor={start + PAGE}"
        more = {"Link": f'<{url}>; rel="next"'}
    return Answer.json(entries, **more)


def _paths(hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str) -> Answer:
    found = _repo(hub, user, repo)
    if isinstance(found, Answer):
        return found
    commit = found.find(rev)
    if commit is None:
        return Answer.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    assert isinstance(asked.body, bytes)
    form = asked.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
    wanted = parse_qs(asked.body.decode())["paths"] if form else asked.data["paths"]
    entries: list[dict[str, Any]] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in commit.files:
            blob = commit.files[name]
            entries.append({"type": "file", "path": name, "size": blob.size, "oid": blob.oid})
        elif any(path.startswith(f"{name}/") for path in commit.files):
            entries.append({"type": "directory", "path": name, "oid": commit.oid})
    return Answer.json(entries)


def _resolve(
    hub: LoopbackHub, asked: Asked, user: User | None, repo: str, rev: str, name: str
) -> Answer:
    found = _repo(hub, user, repo)
    commit = _at(found, rev)
    blob = commit.files.get(name)
    if blob is None:
        missing = Answer.error(404, "EntryNotFound", "Entry not found")
        missing.headers["X-Repo-Commit"] = commit.oid
        return missing
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"Location": f"{hub.storage}/lfs/{blob.sha256}"}
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return Answer(302, headers=headers | {"ETag": f'"{blob.sha256}"'})
    etag = blob.oid if repo not in hub.repos else blob.sha256
    return _content(asked, blob, headers | {"ETag": f'"{etag}"'})


def _object(hub: LoopbackHub, asked: Asked, user: User | None, oid: str) -> Answer:
    blob = hub.store.objects.get(oid)
    return _content(asked, blob, {"ETag": f'"{oid}"'}) if blob else Answer(404)


def _content(asked: Asked, blob: Blob, headers: dict[str, str]) -> Answer:
    start, end, status = 0, blob.size, 200
    wanted = asked.headers.get("Range", "") or ""
    if wanted.startswith("bytes="):
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end, status = int(first), min(int(last or blob.size) + 1, blob.size), 206
        headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
    return Answer(status, headers=headers, file=(blob.path, start, end))


def _refs(hub: LoopbackHub, asked: Asked, user: User | None, repo: str) -> Answer:
    found = _repo(hub, user, repo)
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
        for name, oid in found.refs.items()
        if not name.startswith("refs/")
    ]
    return Answer.json({"branches": branches, "tags": [], "converts": [], "pullRequests": []})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_KIND = "(?:models|datasets)"
_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>.+)", _preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
    ("POST", "/lfs/verify", _verify),
    ("POST", "/lfs/complete/(?P<oid>[0-9a-f]+)", _complete),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _put),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]+)", _object),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>.+)", _commit),
    ("GET POST", rf"/api/models/{_REPO}/discussions", _discuss),
    ("GET", rf"/api/models/{_REPO}/discussions/(?P<num>\d+)", _discussion),
    ("POST", rf"/api/models/{_REPO}/discussions/(?P<num>\d+)/status", _status),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>.+)", _branch),
    ("GET", rf"/api/{_KIND}/{_REPO}/tree/(?P<rev>refs/pr/\d+|[^/]+)(/(?P<name>.+))?", _tree),
    ("POST", rf"/api/{_KIND}/{_REPO}/paths-info/(?P<rev>.+)", _paths),
    ("GET", rf"/api/{_KIND}/{_REPO}/refs", _refs),
    ("GET", rf"/api/{_KIND}/{_REPO}/revision/(?P<rev>.+)", _info),
    ("GET", rf"/api/{_KIND}/{_REPO}", _info),
    (
        "GET HEAD",
        rf"(?:/datasets)?/{_REPO}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<name>.+)",
        _resolve,
    ),
)
