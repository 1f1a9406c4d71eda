"""Going on from a conversion: what it hands down, where it goes, and how another recipe differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, LoopbackHub, serve
from pushing import Done, checkpoint, command

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.pipeline.workspace import open_workspace
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.recipe.typed import default_out

BLOCKS = {
    "objective": "bd3lm",
    "block_size": 8,
    "mask_token_id": 3,
    "token_shift": False,
    "noise_schedule": "polynomial",
    "noise_power": 3.0,
}
WHOLE = {"objective": "mdlm", "block_size": None, "token_shift": True, "noise_schedule": "cosine"}


def conversion(folder: Path, section: Any, noise: Any = None) -> str:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "diffusion": section}
    (folder / "config.json").write_text(json.dumps(config))
    if noise is not None:
        manifest = {"recipe": {"noise": noise, "training": {"steps": 12345}}}
        (folder / "dllm_convert.json").write_text(json.dumps(manifest))
    return str(folder)


def test_target_blocks_noise_and_shift_are_handed_down(tmp_path: Path) -> None:
    source = conversion(
        tmp_path / "a", BLOCKS, {"draw": "time", "views": 2, "discrete_steps": None}
    )
    recipe = load_recipe(source, overrides={})
    assert (recipe.target, recipe.block_size, recipe.token_shift) == ("bd3lm", 8, "drop")
    assert (recipe.noise.schedule, recipe.noise.power) == ("polynomial", 3.0)
    assert (recipe.noise.draw, recipe.noise.views) == ("time", 2)
    assert recipe.training.steps == load_recipe("some/model", overrides={}).training.steps
    recipe = load_recipe(conversion(tmp_path / "b", WHOLE), overrides={})
    assert (recipe.target, recipe.block_size) == ("mdlm", None)
    assert (recipe.token_shift, recipe.noise.schedule) == ("keep", "cosine")


@pytest.mark.parametrize(
    ("section", "typed", "expected"),
    [
        (BLOCKS, {"target": "mdlm"}, {"target": "mdlm", "block_size": None}),
        (BLOCKS, {"block_size": 16}, {"target": "bd3lm", "block_size": 16}),
        (BLOCKS, {"token_shift": "keep"}, {"token_shift": "keep", "block_size": 8}),
        (WHOLE, {"target": "bd3lm"}, {"target": "bd3lm", "block_size": 32}),
        (WHOLE, {"target": "bd3lm", "block_size": 4}, {"block_size": 4}),
    ],
)
def test_what_was_typed_beats_it(section: Any, typed: Any, expected: Any, tmp_path: Path) -> None:
    recipe = load_recipe(conversion(tmp_path, section), overrides=typed)
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_blocks_for_a_conversion_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="block_size 4 is for bd3lm"):
        load_recipe(conversion(tmp_path, WHOLE), overrides={"block_size": 4})


def test_a_typed_schedule_beats_its_power_and_a_typed_power_stays(tmp_path: Path) -> None:
    source = conversion(tmp_path, BLOCKS)
    assert load_recipe(source, overrides={"noise.power": 4.0}).noise.power == 4.0
    noise = load_recipe(source, overrides={"noise.schedule": "cosine"}).noise
    assert (noise.schedule, noise.power) == ("cosine", 2.0)


def test_a_recipe_file_beats_it_and_its_presets_do_not(tmp_path: Path) -> None:
    source = conversion(tmp_path / "a", BLOCKS)
    file = tmp_path / "mine.yaml"
    file.write_text(f"source: {source}\ninherits: sdar\ntoken_shift: keep\n")
    recipe = load_recipe(str(file), overrides={})
    assert (recipe.block_size, recipe.token_shift) == (8, "keep")
    assert recipe.training.steps == 20000
    assert load_recipe(source, overrides={}, preset="sdar").block_size == 4


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"diffusion": 3}', "\xff"])
def test_what_is_no_conversion_hands_nothing_down(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    base = load_recipe("some/model", overrides={})
    recipe = load_recipe(str(tmp_path), overrides={})
    assert recipe.model_dump(exclude={"source"}) == base.model_dump(exclude={"source"})


@pytest.fixture(scope="module")
def hub(
    source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoopbackHub]:
    base, root = source_cache("llama"), tmp_path_factory.mktemp("hub")
    made = checkpoint(base, root / "made")
    (root / "empty").mkdir()
    (root / "empty" / "README.md").write_text("nothing")
    repos = {"me/made": made, "me/base": base, "me/empty": root / "empty", "me/gated": made}
    with serve(LoopbackHub(repos=repos, gated={"me/gated"})) as running:
        yield running


def check(hub: LoopbackHub, home: Path, *arguments: str, **env: str) -> Done:
    return command(hub, home, "check", *arguments, "--json", **env)


def test_a_conversion_on_the_hub_hands_down_what_a_folder_does(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    local = check(hub, tmp_path / "home", str(hub.repos["me/made"])).json
    config = json.loads((hub.repos["me/made"] / "config.json").read_text())
    assert (local["target"], local["block_size"]) == ("bd3lm", config["block_size"])
    plan = check(hub, tmp_path / "home", "me/made").json
    same = ("target", "block_size", "token_shift", "config_updates")
    assert {name: plan[name] for name in same} == {name: local[name] for name in same}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: me/made\nblock_size: 2\n")
    assert check(hub, tmp_path / "home", str(recipe)).json["block_size"] == 2
    typed = check(hub, tmp_path / "home", "me/made", "--to", "mdlm").json
    assert (typed["target"], typed["block_size"]) == ("mdlm", None)
    assert check(hub, tmp_path / "home", "me/base").json["block_size"] == 32 != config["block_size"]


def test_a_conversion_in_the_cache_hands_it_down_without_a_network(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    first = command(hub, tmp_path / "home", "run", "me/made", "--no-train", "--verify", "files",
                    "--out", str(tmp_path / "again"))  # fmt: skip
    assert first.code == 0, first.stderr
    pinned = ("me/made", "--source-revision", COMMIT)
    found = check(hub, tmp_path / "home", *pinned, HF_HUB_OFFLINE="1")
    assert found.code == 0, found.stderr
    assert found.json["target"] == "bd3lm"


@pytest.mark.parametrize(
    ("source", "env", "said"),
    [
        ("me/made", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach the Hub for me/made"),
        ("me/made", {"HF_HUB_OFFLINE": "1"}, "cannot reach the Hub for me/made"),
        ("me/gated", {}, "me/gated is gated"),
        ("me/nothing", {}, "me/nothing is not on the Hub"),
        ("me/empty", {}, "config.json"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_the_ordinary_error_of_the_source(
    source: str, env: dict[str, str], said: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    found = check(hub, tmp_path / "home", source, **env)
    assert (found.code, found.stderr.count("\n")) == (1, 1)
    assert said in found.stderr


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        ("x-bd3lm", "bd3lm", "x-bd3lm-2"),
        ("out/x-bd3lm-2", "bd3lm", "x-bd3lm-3"),
        ("me/x-bd3lm", "mdlm", "x-mdlm"),
        ("x-mdlm", "mdlm", "x-mdlm-2"),
        ("x", "mdlm", "x-mdlm"),
    ],
)
def test_names_do_not_pile_up(source: str, target: str, name: str) -> None:
    block = 8 if target == "bd3lm" else None
    recipe = Recipe.model_validate({"source": source, "target": target, "block_size": block})
    assert default_out(recipe) == Path(name)


def test_another_recipe_is_told_by_its_fields(tmp_path: Path) -> None:
    before = {"target": "mdlm", "training": {"steps": 5, "seed": 0}, "data": {"source": "a"}}
    now = {"target": "mdlm", "training": {"steps": 7, "seed": 0}, "data": {"source": "b"}}
    with open_workspace(tmp_path / "out", "1", before) as workspace:
        workspace.stage("train", dict)
    with (
        pytest.raises(DataError, match=r"recipe or source: training\.steps is 7, it was 5"),
        open_workspace(tmp_path / "out", "2", now),
    ):
        pass
    with open_workspace(tmp_path / "out", "1", before) as workspace:
        assert workspace.result("train") == {}
