"""Upload an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from config import InputError


def check_push(name: str) -> None:
    """Raise InputError for a name that the hub does not allow, and without a login. Contacts nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push {name!r:.100}: {error}; give a name such as user/my-model.") from None
    if not get_token():
        raise InputError(
            "--push: not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN to a token that may write."
        )


def push(folder: Path, name: str) -> str:
    """Upload all files of a folder into the hub's repository `name`, which is created, private, if it does not exist.

    Returns its address. Raises InputError if the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload an exported model")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}: exported and proven, but not uploaded to {name} ({reason:.300}). Repeat the upload with "
            f"hf upload {name} {folder}."
        ) from error
    return str(repository)
