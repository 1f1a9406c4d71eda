"""Nothing goes up that was not meant for others: credentials, home folders, files nobody listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.common.redaction import without_paths
from dllm_convert.common.secrets_found import find_homes, find_secrets, refuse_secrets
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.publishing.scan import OVERLAP, PIECE, check_staged
from dllm_convert.publishing.staging import published_names
from dllm_convert.recipe.schema import Recipe

# Put together here, so that no scanner of repositories takes them for real ones.
SECRETS = [
    "hf_" + "aB3" * 11,
    "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "ghp_" + "a1" * 18,
    "sk-" + "proj-" + "a1B2" * 10,
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "xoxb-" + "1234567890-abcdef",
]
HARMLESS = [
    *("hf_transfer", "hf_hub_download", "HF_TOKEN", "sk-learn", "scikit-learn", "task-specific"),
    *("a" * 40, "0123456789abcdef" * 4, "https://huggingface.co/a/b", "npm_config_cache"),
]


def staged(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    listed = {"format_version": 1, "files": hash_files(folder)}
    write_manifest(folder, listed | {"sample": {"prompt": "In /home/x/", "text": "y there"}})
    return folder


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README__md", "recipe__yaml", "report__html", "chat__jinja"])
def test_a_credential_is_named_by_file_and_line(tmp_path: Path, name: str, secret: str) -> None:
    folder = staged(tmp_path / "s", **{name: f"one\ntwo\nthree {secret}, and more\n"})
    with pytest.raises(DataError, match=r"line 3: ") as caught:
        check_staged(folder)
    assert name.replace("__", ".") in str(caught.value)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_alike_is_published(tmp_path: Path, text: str) -> None:
    check_staged(staged(tmp_path / "s", README__md=f"see {text} for it\n"))


def test_the_token_of_this_process_is_found_whatever_it_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    folder = staged(tmp_path / "s", README__md="x a-token-of-another-form y")
    with pytest.raises(DataError, match="your access token"):
        check_staged(folder)


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/x.txt",
        "/Users/me/x",
        "C:\\Users\\me\\x",
        "file:///home/me/x",
        "C:\\\\Users\\\\me\\\\x",
    ],
)
def test_a_home_folder_is_named(tmp_path: Path, path: str) -> None:
    folder = staged(tmp_path / "s", README__md=f"trained on {path}\n")
    with pytest.raises(DataError, match=r"README.md, line 1: a path in a home folder"):
        check_staged(folder)


def test_this_users_home_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/data/people/me")
    with pytest.raises(DataError, match="your home folder"):
        check_staged(staged(tmp_path / "s", README__md="from /data/people/me/texts"))


def test_folders_of_others_are_none_of_ours(tmp_path: Path) -> None:
    # What the model wrote, and what a template of the base says of its sandbox.
    check_staged(
        staged(tmp_path / "s", README__md="> In /home/x/y there", chat_template__jinja="/home/oai/")
    )


@pytest.mark.parametrize("name", ["sub/notes.md", "sub/deeper/picture.png", "sub/LICENSE"])
def test_only_what_lies_at_the_top_travels(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=name):
        published_names(tmp_path, ())


def test_a_recipe_with_a_token_is_refused_before_anything_is_written() -> None:
    recipe: dict[str, Any] = {
        "source": "x/y",
        "target": "mdlm",
        "description": f"uses {SECRETS[0]}",
    }
    with pytest.raises(IncompatibleError, match="description of the recipe") as caught:
        refuse_secrets(Recipe.model_validate(recipe).model_dump())
    assert SECRETS[0] not in str(caught.value)
    refuse_secrets(Recipe.model_validate(recipe | {"description": "hf_transfer"}).model_dump())


def test_lines_are_counted_from_one() -> None:
    assert [f.line for f in find_secrets(f"{SECRETS[0]}\n\n{SECRETS[2]}")] == [1, 3]
    assert [f.line for f in find_homes(json.dumps({"a": "/home/me/x"}))] == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/a,b (c)/x.json is missing", "x.json is missing"),
        ("/home/me/[new] {x}/100%/#1/a&b/!/x", "x"),
        ("/home/me/a.txt, /home/me/b.txt", "a.txt, b.txt"),
        ("file:///home/me/x.json", "x.json"),
        ("file://localhost/home/me/x.json", "x.json"),
        (
            "see https://x.org/a,b/(c) and ftp://x.org/a/b",
            "see https://x.org/a,b/(c) and ftp://x.org/a/b",
        ),
    ],
)
def test_paths_with_signs(text: str, expected: str) -> None:
    assert without_paths(text) == expected


@pytest.mark.parametrize("name", ["facts__json", "rows__jsonl", "recipe__yaml", "report__html"])
@pytest.mark.parametrize(
    "text",
    [
        r'{"a": "\u002fhome\u002fme"}',
        r'{"a": "\/home\/me\/x"}',
        r'{"a": "\u0043:\\Users\\me"}',
        r'{"a": "x\n' + SECRETS[0] + '"}',
        r'{"a": "\u0068' + SECRETS[0][1:] + '"}',
        r'{"a": "\x2fhome\x2fme"}',
        '{"a": "&#47;home&#47;me"}',
    ],
)
def test_what_is_escaped_is_read_as_it_is_meant(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match="line 2: ") as caught:
        check_staged(staged(tmp_path / "s", **{name: f"\n{text}\n"}))
    assert "more such places" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *('"/home/me"', "/Users/me", "file:///home/me", r"C:\Users\me", r"c:\users\me\x"),
        *(r"C:\Documents and Settings\me\x", "D:/Users/me"),
    ],
)
def test_a_home_folder_needs_nothing_below_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="line 1: a path in a home folder"):
        check_staged(staged(tmp_path / "s", README__md=text))


@pytest.mark.parametrize("own", ["/data/people/me", "/root"])
def test_this_users_home_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.setenv("HOME", own)
    check_staged(staged(tmp_path / "a", README__md=f"</root> {own}s"))
    with pytest.raises(DataError, match="your home folder"):
        check_staged(
            staged(tmp_path / "b", README__md=f"from {own}{'/x' if own == '/root' else ''}")
        )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://x.org/home/about",
            "docs.x.org/Users/guide",
            "Tom &amp; me\\n",
            "/home/",
            "/Users",
        ),
        *(r"\u00e9t\u00e9 \ud83d\ude00 \U0001F600 \Uffffffff", "sk-learn\\nsk-image"),
    ],
)
def test_addresses_and_escapes_of_others_are_published(tmp_path: Path, text: str) -> None:
    check_staged(staged(tmp_path / "s", README__md=f"{text}\n", LICENSE="/home/me"))


@pytest.mark.parametrize("before", [0, PIECE - 10, PIECE - OVERLAP, 2 * PIECE + 3, 5 * PIECE])
def test_long_texts_are_read_to_their_end(tmp_path: Path, before: int) -> None:
    lines, rest = divmod(before, 64)
    text = ("x" * 63 + "\n") * lines + "." * rest + SECRETS[0] + " /home/me/x\n"
    with pytest.raises(DataError, match=f"line {lines + 1}: .*, and 1 more such") as caught:
        check_staged(staged(tmp_path / "s", rows__jsonl=text))
    assert SECRETS[0] not in str(caught.value)
