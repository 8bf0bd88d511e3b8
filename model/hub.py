"""Ask the hub for the models of a config before work begins: once and shortly, instead of retrying for minutes after it."""

from __future__ import annotations

import os
import sys

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers.utils import cached_file

from config import InputError, ModelConfig, printable, shortened
from model.build import hub_models, weight_files

SECONDS = 6.0  # for one answer


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
    print(printable(f"note: {_hub()} does not answer ({reason}); {', '.join(names)}: read from the local cache"))


def other_ways(name: str) -> str:
    """Return advice on how to get a model of the hub where the hub cannot be reached."""
    folder = name.rpartition("/")[2]
    return (
        "Give a folder with the model instead of its name; or use a mirror of the hub: set HF_ENDPOINT, for example "
        "HF_ENDPOINT=https://hf-mirror.com sh train.sh; or download from ModelScope and give that folder: "
        f"{sys.executable} -m pip install modelscope, then modelscope download --model {name} --local_dir {folder}"
    )


def _hub() -> str:
    return f"the hub ({constants.ENDPOINT})"


def _refusal(name: str) -> str | None:
    """Return why the hub does not answer; None if it does. Raises InputError for a name that it does not have."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        found = get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
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
    # a hub names the commit; the login page of a network does not
    return None if found.commit_hash else "something else answers in its place"


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
