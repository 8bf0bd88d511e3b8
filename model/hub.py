"""The model hub: who may contact it, and one short question about the models of a config before work begins, instead of
retries for minutes after it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Set

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers.utils import cached_file

from config import InputError, ModelConfig, printable, shortened
from model.build import weight_files

SECONDS = 6.0  # for one answer
_ANSWERED: set[str] = set()  # addresses about which the hub has answered: it is asked once in a process
_PRINTED: set[str] = set()  # notes


def hub_models(model: ModelConfig) -> set[str]:
    """Return the hub names among the models that the config names. Folders are absolute paths."""
    named = (model.vision_tower, model.language_model)
    return {str(name) for name in named if name is not None and not os.path.isabs(name)}


def check_hub(*models: ModelConfig) -> None:
    """Ask the hub for every model that the configs name by a hub name.

    If the hub does not answer, this process reads only the local cache from then on, without trying the hub again. Raises
    InputError for a name that the hub does not have or does not give out, and if the hub does not answer and the cache does
    not have everything, with other ways to get the models.
    """
    weights = set().union(*map(hub_models, models))
    tokenizers = {model.from_scratch.tokenizer for model in models if model.from_scratch is not None}
    names = sorted(weights | {str(name) for name in tokenizers if not os.path.isabs(name)})
    reason = None
    for name in names:
        if (reason := _refusal(name)) is not None:
            break  # the others would wait for the same answer
    if reason is None:
        return
    lacking = [name for name in names if not (_has_weights(name) if name in weights else _has_tokenizer(name))]
    if lacking:
        raise InputError(
            f"{', '.join(lacking)}: neither a folder nor on this machine, and {_hub()} does not answer ({reason}). "
            f"{other_ways(lacking[0])}"
        )
    constants.HF_HUB_OFFLINE = True
    note = f"note: {_hub()} does not answer ({reason}); {', '.join(names)}: read from the local cache"
    if note not in _PRINTED:
        _PRINTED.add(note)
        print(printable(note))


@contextlib.contextmanager
def hub_access(model: ModelConfig, own_models: Set[str], allow_download: bool) -> Iterator[None]:
    """Let the block contact the hub only if the user has named every model (`own_models`) or allows the download. Else the
    block reads folders and the local cache, because a checkpoint from somebody else may name any repository.

    Raises InputError if a model is missing that may not be downloaded, and like `check_hub`.
    """
    names = hub_models(model)
    missing = ", ".join(sorted(name for name in names if not _has_weights(name)))
    if allow_download or (names and names <= own_models):
        check_hub(dataclasses.replace(model, from_scratch=None))  # a checkpoint has its own tokenizer
        if missing:
            print(f"downloading from the hub: {printable(missing)}")
        yield
        return
    advice = "Add --allow-download, or give a folder: model.vision_tower=FOLDER or model.language_model=FOLDER."
    if missing:
        raise InputError(
            f"{missing}: the checkpoint was trained on top of this model of the hub, which is not on this machine. {advice}"
        )
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # what the environment variable of that name sets
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} The hub was not contacted. {advice}" if names else str(error)) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def other_ways(name: str) -> str:
    """Return advice on how to get a model of the hub where the hub cannot be reached."""
    folder, command = name.rpartition("/")[2], os.path.join(os.path.dirname(sys.executable), "modelscope")
    return (
        "Give a folder with the model instead of its name; or use a mirror of the hub: set HF_ENDPOINT, for example "
        "HF_ENDPOINT=https://hf-mirror.com sh train.sh; or download from ModelScope and give that folder: "
        f"{sys.executable} -m pip install modelscope, then {command} download --model {name} --local_dir {folder}"
    )


def _hub() -> str:
    return f"the hub ({constants.ENDPOINT})"


def _refusal(name: str) -> str | None:
    """Return why the hub does not answer; None if it does. Raises InputError for a name that it does not have."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        address = hf_hub_url(name, "config.json")
        if address in _ANSWERED:
            return None
        found = get_hf_file_metadata(address, timeout=SECONDS)
    except EntryNotFoundError:  # what reads it says which files it needs
        return None
    except GatedRepoError:
        if _has_weights(name):
            return None
        raise InputError(
            f"{name}: its owner gives it out after a request: accept its terms at {constants.ENDPOINT}/{name}, then log in "
            "with: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        if _has_weights(name):
            return None
        raise InputError(
            f"{name}: not a folder, and {_hub()} has no such model. Check the path, which is relative to the config file's "
            "folder, or the name. For a private model, log in with: hf auth login"
        ) from None
    except Exception as error:  # of the network, of proxies, of servers: nearly anything
        return shortened(" ".join(str(error).split()) or type(error).__name__)
    if not found.commit_hash:  # a hub names the commit; the login page of a network does not
        return "something else answers in its place"
    _ANSWERED.add(address)
    return None


def _has_weights(name: str) -> bool:
    try:
        return weight_files(name) is not None
    except (OSError, ValueError):  # not a name that the hub allows
        return False


def _has_tokenizer(name: str) -> bool:
    options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    try:
        return any(cached_file(name, file, **options) for file in ("tokenizer.json", "qwen.tiktoken"))
    except (OSError, ValueError):
        return False
