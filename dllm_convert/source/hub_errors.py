"""What huggingface_hub raises, turned into one line that says what to do."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from dllm_convert.common.nearest import meant
from dllm_convert.errors import HubError

Doing = Literal["read", "write"]

PRECONDITION_FAILED = 412
_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"
_HOW_TO_WRITE = (
    "Use a token with write access to that namespace (`hf auth login` or HF_TOKEN), "
    "or propose the files with --create-pr"
)
_STORAGE_WORDS = ("storage", "quota")


def transport_error() -> type[Exception]:
    """Return the base error of the HTTP library that huggingface_hub happens to use.

    1.x raises httpx's, 2.x those of httpx2, unwrapped; neither is a dependency of ours.
    """
    from huggingface_hub import get_session

    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    error: type[Exception] = library.HTTPError
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status an error carries, None if no answer came."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def first_line(error: BaseException) -> str:
    """Return the first line an error says, or its name if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_passing(error: BaseException) -> bool:
    """Whether an error may be gone on the next try: no answer, too many requests, or the server's.

    A server that refuses for good (no rights, bad token, quota) is not asked twice.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = status_of(error)
    return status is None or status == 429 or (status >= 500 and status != 507)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, doing: Doing = "read") -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError that says what to do.

    Args:
        repo_id: Repository the block works on.
        revision: Revision it asks for.
        doing: Whether it reads or writes; a refusal is explained accordingly.

    Raises:
        HubError: The Hub refused, is unreachable, or does not have what was named.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: its owner has to grant access",
            hint=f"Ask at https://huggingface.co/{repo_id}, then `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id} has no revision {revision!r}", hint="Give a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _not_found(repo_id, doing) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"not logged in to the Hub, needed for {repo_id}", hint=_LOGIN) from error
    except (errors.HFValidationError, errors.EntryNotFoundError) as error:
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        raise (
            _unreachable(repo_id, error, doing) if offline else HubError(f"{repo_id}: {error}")
        ) from error
    except (errors.OfflineModeIsEnabled, transport_error()) as error:
        if isinstance(error, errors.HfHubHTTPError) and status_of(error) is not None:
            raise _refused(repo_id, error, doing) from error
        raise _unreachable(repo_id, error, doing) from error


def _check(guess: str) -> str:
    """Return the beginning of a hint: a guess, if there is one, and what to look at besides."""
    return f"{guess}Otherwise check" if guess else "Check"


def _not_found(repo_id: str, doing: Doing) -> HubError:
    message = f"{repo_id} is not on the Hub, or is private"
    if doing == "write":
        return HubError(message, hint=_HOW_TO_WRITE)
    nearest = _nearest_recipe(repo_id)
    guess = meant(repo_id) or (f"Did you mean the recipe {nearest!r}? " if nearest else "")
    return HubError(
        f"{message}, and is no folder here",
        hint=f"{_check(guess)} the name; for a private one `hf auth login` or set HF_TOKEN",
    )


def _nearest_recipe(repo_id: str) -> str | None:
    import difflib

    from dllm_convert.recipe.loading import list_recipes

    names = [entry.name for entry in list_recipes()]
    nearest = difflib.get_close_matches(repo_id.rpartition("/")[2].lower(), names, n=1)
    return nearest[0] if nearest else None


def _refused(repo_id: str, error: BaseException, doing: Doing) -> HubError:
    status = status_of(error) or 0
    said = str(getattr(error, "server_message", None) or "").strip().rstrip(".")
    because = f": {said}" if said else ""
    activity = "reading" if doing == "read" else "writing to"
    if status == 401:
        return HubError(
            f"the Hub refused the access token while {activity} {repo_id} (HTTP 401)",
            hint="Log in again with `hf auth login`, or correct HF_TOKEN",
        )
    if any(word in said.lower() for word in _STORAGE_WORDS) or status in (402, 413, 507):
        return HubError(
            f"the Hub has no room for {repo_id} (HTTP {status}{because})",
            hint="Free storage of that namespace, push with --public, or give another repository",
        )
    if status == 403:
        return HubError(
            f"no rights for {activity} {repo_id} (HTTP 403{because})",
            hint=_HOW_TO_WRITE if doing == "write" else _LOGIN,
        )
    if status == PRECONDITION_FAILED:
        return HubError(
            f"{repo_id} was changed by somebody else during the push",
            hint="Look at what changed, then run the same command again",
        )
    return HubError(
        f"the Hub answered HTTP {status} for {repo_id}{because}",
        hint="Try again later" if status >= 500 or status == 429 else None,
    )


def _unreachable(repo_id: str, error: BaseException, doing: Doing) -> HubError:
    said = first_line(error)
    if doing == "write":
        return HubError(
            f"cannot reach the Hub for {repo_id} ({said})",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; the same command uploads "
            "only what is missing",
        )
    return HubError(
        f"cannot reach the Hub for {repo_id}, which is no folder here and not in the local cache "
        f"({said})",
        hint=f"{_check(meant(repo_id))} the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a "
        "local folder",
    )
