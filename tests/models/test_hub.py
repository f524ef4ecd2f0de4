"""Upload to the Hugging Face hub and download from it, with a folder in its place."""

import builtins
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linrnn.models import LanguageModel
from linrnn.models.card import model_card

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which repositories are folders of revisions."""

    class Api:
        def __init__(self, token: str | None = None):
            self.token = token

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            assert exist_ok
            repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
            (tmp_path / repo_id / "main").mkdir(parents=True, exist_ok=True)
            (tmp_path / repo_id / "settings").write_text(json.dumps([private, self.token]))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            shutil.copytree(tmp_path / repo_id / "main", tmp_path / repo_id / branch)

        def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
            return (tmp_path / repo_id / (revision or "main") / filename).exists()

        def upload_folder(
            self,
            *,
            repo_id: str,
            folder_path: str,
            revision: str | None,
            commit_message: str,
            create_pr: bool,
            delete_patterns: list[str],
        ) -> SimpleNamespace:
            target = tmp_path / repo_id / (revision or "main")
            for path in [path for path in target.rglob("*") if path.is_file()]:
                if any(fnmatch(str(path.relative_to(target)), pattern) for pattern in delete_patterns):
                    path.unlink()
            shutil.copytree(folder_path, target, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{'pr' if create_pr else 'commit'}/1")

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source = tmp_path / repo_id / (revision or "main")
        target = tmp_path / "cache" / source.name
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path


def make() -> LanguageModel:
    return LanguageModel(7, d_model=16, n_layers=1)


def test_push_and_load(hub: Path) -> None:
    model, ids = make(), torch.randint(7, (2, 9))
    assert model.push_to_hub("tiny", private=True, token="t") == "https://hub/me/tiny/commit/1"
    assert json.loads((hub / "me" / "tiny" / "settings").read_text()) == [True, "t"]
    assert {p.name for p in (hub / "me/tiny/main").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert torch.equal(LanguageModel.from_pretrained("me/tiny")(ids)[0], model(ids)[0])
    assert {p.name for p in (hub / "cache/main").iterdir()} == {"config.json", "model.safetensors"}  # nothing else


def test_a_card_that_is_there_stays_and_old_shards_go(hub: Path) -> None:
    make().push_to_hub("me/tiny")
    main = hub / "me/tiny/main"
    (main / "README.md").write_text("mine")
    (main / "model-00001-of-00002.safetensors").write_text("old")
    (main / "models").mkdir()
    others = [main / "model_ema.safetensors", main / "models" / "vae.safetensors", main / "model-ema-of-x.safetensors"]
    for other in others:
        other.write_text("mine")
    make().push_to_hub("me/tiny", create_pr=True)
    assert (main / "README.md").read_text() == "mine"
    assert not list(main.glob("model-0*")) and all(other.exists() for other in others)


def test_a_branch(hub: Path) -> None:
    make().push_to_hub("me/tiny")
    model, ids = make(), torch.randint(7, (2, 9))
    model.push_to_hub("me/tiny", revision="second")
    assert torch.equal(LanguageModel.from_pretrained("me/tiny", revision="second")(ids)[0], model(ids)[0])
    assert not torch.equal(LanguageModel.from_pretrained("me/tiny")(ids)[0], model(ids)[0])


def test_what_cannot_be_saved_makes_no_repository(hub: Path) -> None:
    model = LanguageModel(7, d_model=16, n_layers=1, mixer_kwargs={"max_phase": torch.tensor(0.5)})
    with pytest.raises(TypeError, match="arguments that JSON can hold"):
        model.push_to_hub("me/tiny")
    assert not (hub / "me").exists()


def test_the_card_is_valid_and_its_code_runs(hub: Path) -> None:
    card = huggingface_hub.ModelCard(model_card(make(), "me/tiny"))
    assert card.data.library_name == "linrnn" and card.data.pipeline_tag == "text-generation"
    make().push_to_hub("me/tiny")
    namespace: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], namespace)
    assert isinstance(namespace["model"], LanguageModel)
    assert json.loads(card.text.split("```json\n")[1].split("```")[0])["vocab_size"] == 7


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    for call in (lambda: make().push_to_hub("me/tiny"), lambda: LanguageModel.from_pretrained("me/tiny")):
        with pytest.raises(ImportError, match=r"pip install 'linrnn\[hf\]'"):
            call()
