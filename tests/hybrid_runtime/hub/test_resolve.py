"""Names become paths: existing ones, aliases, repositories, one GGUF of several; everything else is refused kindly."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from hybrid_runtime.errors import DownloadError, UsageError
from hybrid_runtime.hub.aliases import ALIASES
from hybrid_runtime.hub.names import is_repo_id
from hybrid_runtime.hub.resolve import resolve_model
from hybrid_runtime.hub.settings import hub_cache_dir, hub_endpoint, hub_is_offline
from hybrid_runtime.shipped import SHIPPED_MODELS

GGUF_REPO = "acme/sparse-gguf"
MODELS_MD = Path(__file__).parents[3] / "models.md"


@pytest.fixture
def use_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    return hub


def add_ggufs(hub, client, *names: str) -> dict[str, bytes]:
    files = {"README.md": b"#", **{name: client.random_bytes(50_000, i) for i, name in enumerate(names)}}
    hub.add(GGUF_REPO, files)
    return files


def test_existing_folder_and_gguf_are_returned_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    Path("model.gguf").write_bytes(b"GGUF")
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model("model.gguf") == Path("model.gguf")
    assert resolve_model(str(tmp_path / "org")) == tmp_path / "org"
    with pytest.raises(UsageError, match="--revision v1 means nothing"):
        resolve_model("org/name", revision="v1")


def test_folder_named_like_an_alias_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bamboo-7b").mkdir()
    assert resolve_model("bamboo-7b") == Path("bamboo-7b")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="a model is a folder"):
        resolve_model(str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "../secret",
        "a/../b",
        "/no/such/folder",
        "./missing",
        "~/missing",
        "org\\name",
        "C:\\models\\x",
        "nul\0byte",
        "tab\tname",
        "escape\x1b[31m",
        "a/b/c",
        "org/na me",
        "org/x..y",
        "org/x--y",
        "-rf",
        "x" * 201,
        "a/" * 150,
        "org/name:model.bin",
        "org/name:../x.gguf",
        "org/name:",
        "org/name:a:b.gguf",
    ],
)
def test_unsafe_and_impossible_names_are_usage_errors(use_hub, name):
    with pytest.raises(UsageError) as caught:
        resolve_model(name)
    assert str(caught.value).isprintable()
    assert use_hub.hits == []


@pytest.mark.parametrize("revision", ["../../x", "a//b", "-x", "a\nb", ".hidden", "x" * 201, ""])
def test_unsafe_revisions_are_usage_errors(use_hub, revision):
    with pytest.raises(UsageError, match="is not the name of a branch"):
        resolve_model("acme/sparse-1b", revision=revision)
    assert use_hub.hits == []


def test_misspelt_alias_is_answered_with_close_ones():
    with pytest.raises(UsageError, match=r"unknown model 'turbosparse-mistrl'.*did you mean turbosparse-mistral"):
        resolve_model("turbosparse-mistrl")
    with pytest.raises(UsageError, match="aliases are turbosparse-mixtral, "):
        resolve_model("zzzzzz")


def test_repository_id_is_downloaded_into_the_shared_cache(use_hub, client):
    use_hub.add(client.repo, client.model_files())
    snapshot = resolve_model(client.repo)
    assert snapshot.parent.parent.parent == hub_cache_dir()
    assert (snapshot / "config.json").is_file()


def test_token_of_the_environment_opens_a_gated_repository(use_hub, client, monkeypatch):
    use_hub.add(client.repo, client.model_files(), gated=True)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    resolve_model(client.repo)
    assert {hit.token for hit in use_hub.hits if hit.server == "hub"} == {"Bearer hf_environment"}


def test_alias_takes_the_new_organisation(use_hub, client, tmp_path):
    use_hub.add("Tiiny/TurboSparse-Mixtral", client.model_files())
    snapshot = resolve_model("TurboSparse-Mixtral", cache_dir=tmp_path / "c")  # letters' case does not count
    assert snapshot.parts[-3] == "models--Tiiny--TurboSparse-Mixtral"


@pytest.mark.parametrize(
    "typed", ["turbosparse-mixtral", "Tiiny/TurboSparse-Mixtral", "PowerInfer/TurboSparse-Mixtral"]
)
def test_former_organisation_is_tried_when_the_new_one_is_unknown(use_hub, client, tmp_path, typed):
    use_hub.add("PowerInfer/TurboSparse-Mixtral", client.model_files())
    snapshot = resolve_model(typed, cache_dir=tmp_path / "c")
    assert snapshot.parts[-3] == "models--PowerInfer--TurboSparse-Mixtral"


def test_copy_cached_under_the_former_id_is_not_downloaded_again(use_hub, client, tmp_path):
    files = client.model_files()
    use_hub.add("PowerInfer/TurboSparse-Mixtral", files)
    first = resolve_model("turbosparse-mixtral", cache_dir=tmp_path / "c")
    use_hub.add("Tiiny/TurboSparse-Mixtral", files)
    use_hub.hits.clear()
    assert resolve_model("turbosparse-mixtral", cache_dir=tmp_path / "c") == first
    assert [hit for hit in use_hub.hits if hit.file] == []


def test_model_that_no_organisation_has_names_both(use_hub):
    with pytest.raises(DownloadError, match=r"Tiiny/Bamboo-base-v0_1.*PowerInfer/Bamboo-base-v0_1"):
        resolve_model("bamboo-7b")


def test_offline_uses_the_cache_and_asks_nobody(use_hub, client, caplog, monkeypatch):
    use_hub.add(client.repo, client.model_files())
    snapshot = resolve_model(client.repo)
    use_hub.hits.clear()
    with caplog.at_level(logging.INFO):
        assert resolve_model(client.repo, offline=True) == snapshot
    assert f"offline: using the cached copy {snapshot}" in caplog.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(client.repo) == snapshot
    assert use_hub.hits == []


def test_offline_without_a_copy_names_the_endpoint_and_the_way_out(use_hub):
    with pytest.raises(DownloadError) as caught:
        resolve_model("acme/sparse-1b", offline=True)
    assert use_hub.endpoint in str(caught.value)
    assert "copy that folder here" in str(caught.value)
    assert use_hub.hits == []


def test_one_gguf_of_several_is_selected_by_name(use_hub, client):
    files = add_ggufs(use_hub, client, "a-q4_0.gguf", "sub/b-q8_0.gguf")
    for name in ("a-q4_0.gguf", "sub/b-q8_0.gguf"):
        use_hub.hits.clear()
        path = resolve_model(f"{GGUF_REPO}:{name}")
        assert path.read_bytes() == files[name]
        assert path.as_posix().endswith(f"/{name}")
        assert {hit.file for hit in use_hub.hits if hit.file} == {name}
        assert resolve_model(f"{GGUF_REPO}:{name}", offline=True) == path


def test_gguf_must_be_chosen_among_several_and_must_exist(use_hub, client):
    add_ggufs(use_hub, client, "a.gguf", "b.gguf")
    with pytest.raises(UsageError, match=f"choose one as {GGUF_REPO}:a.gguf, {GGUF_REPO}:b.gguf"):
        resolve_model(GGUF_REPO)
    with pytest.raises(UsageError, match=r"has no file 'c.gguf'; it has .*:a.gguf"):
        resolve_model(f"{GGUF_REPO}:c.gguf")


def test_only_gguf_of_a_repository_needs_no_name(use_hub, client):
    files = add_ggufs(use_hub, client, "only.gguf")
    path = resolve_model(GGUF_REPO)
    assert path.name == "only.gguf"
    assert path.read_bytes() == files["only.gguf"]
    assert resolve_model(GGUF_REPO, offline=True) == path


def test_settings_are_read_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub_cache_dir() == tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert hub_cache_dir() == tmp_path / "elsewhere"
    assert hub_endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert hub_endpoint() == "https://hub.example"
    assert not hub_is_offline()
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    assert hub_is_offline()


def test_aliases_cannot_be_changed_and_are_well_formed():
    with pytest.raises(TypeError):
        ALIASES["x"] = ALIASES["bamboo-7b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALIASES["bamboo-7b"].repo_id = "x/y"
    for name, alias in ALIASES.items():
        assert name == alias.name == name.lower()
        assert is_repo_id(alias.repo_id)
        assert alias.former_repo_id is None or alias.former_repo_id.split("/")[1] == alias.repo_id.split("/")[1]


def test_models_md_lists_every_alias_with_its_repository_and_licence():
    rows = [line.strip("|").split("|") for line in MODELS_MD.read_text(encoding="utf-8").splitlines() if "|" in line]
    table = {
        row[0].strip().strip("`"): [cell.strip() for cell in row] for row in rows if row[0].strip().startswith("`")
    }
    assert list(table)[:2] == ["tinystories-moe", "random-demo"]
    assert set(table) == {*SHIPPED_MODELS, "random-demo", *ALIASES}
    for name, alias in ALIASES.items():
        assert f"`{alias.repo_id}`" in table[name][1]
        assert alias.former_repo_id is None or f"`{alias.former_repo_id}`" in table[name][1]
        assert table[name][3] == alias.licence
        assert table[name][4] == alias.parameters
