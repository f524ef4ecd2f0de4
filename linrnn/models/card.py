"""Models on the Hugging Face hub: the upload, and the card that says what it is and how to load it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from linrnn.models.files import INDEX, WEIGHTS

if TYPE_CHECKING:
    from linrnn.models.pretrained import Pretrained

CARD = "README.md"
SHARDS = "model-{0}-of-{0}.safetensors".format("[0-9]" * 5)  # for fnmatch, whose * would match folders too
TAGS = {"LanguageModel": "text-generation", "SequenceClassifier": "text-classification"}


def upload(
    model: "Pretrained",
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    token: str | None,
) -> str:
    """Saves a model to a repository; see `Pretrained.push_to_hub`."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            "push_to_hub needs huggingface_hub, which is not installed: pip install 'linrnn[hf]'"
        ) from error
    model.describe_config()  # what cannot be saved makes no repository
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if not api.file_exists(repo_id, CARD, revision=revision):
            Path(folder, CARD).write_text(model_card(model, repo_id), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=[SHARDS, WEIGHTS, INDEX],  # those of what was there
        )
    return str(commit.commit_url)


def model_card(model: "Pretrained", repo_id: str) -> str:
    """Returns the text of a README.md for a model in the repository `repo_id`."""
    from linrnn import __version__
    from linrnn.models.optim import count_params

    name = type(model).__name__
    metadata = ["library_name: linrnn", "tags:", "- linrnn", "- linear-rnn"]
    if name in TAGS:
        metadata.insert(1, f"pipeline_tag: {TAGS[name]}")
    arguments = json.dumps(vars(model.config), indent=2)
    module = type(model).__module__
    module = "linrnn.models" if module.startswith("linrnn.models.") else module
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {repo_id.rsplit('/', 1)[-1]}",
            "",
            f"A `{name}` of linrnn with {count_params(model):,} parameters, saved by linrnn {__version__}.",
            "",
            "```python",
            f"from {module} import {name}",
            "",
            f'model = {name}.from_pretrained("{repo_id}")',
            "```",
            "",
            "Its arguments:",
            "",
            "```json",
            arguments,
            "```",
            "",
        ]
    )
