"""What can go wrong between here and the Hub: what is tried again, what is said of the rest in one line, and whether
the token that goes with requests can be sent and may write."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from . import disk
from .errors import InputError, first_line


Say = Callable[[str], object]
Result = TypeVar("Result")

_ATTEMPTS = 5
_PASSING = (408, 429, 500, 502, 503, 504)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_LONGEST = 300.0  # seconds that a Hub may ask to wait: the window of its rate limits


def quiet(_: str) -> None:
    """Says nothing."""


def steady(call: Callable[[], Result], say: Say = quiet, attempts: int = _ATTEMPTS) -> Result:
    """`call()`, tried again after errors that pass: a connection that broke, 429 and 5xx, as long as the Hub asks."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == attempts:
                raise
            say(f"{_reason(error)}; again in {wait:g} s ({attempt} of {attempts - 1})")
            time.sleep(wait)
    raise AssertionError("unreachable")


def status(error: BaseException) -> int | None:
    """The status that the Hub answered with, where an error comes from an answer."""
    answer = _answer(error)
    return answer.status_code if answer is not None else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: BaseException) -> httpx.Response | None:
    found = (each.response for each in _chain(error) if isinstance(each, HfHubHTTPError | httpx.HTTPStatusError))
    return next(found, None)


def _is_broken(error: BaseException) -> bool:
    """Whether the connection broke, or what came through it is no Hub's answer."""
    if any(isinstance(each, OfflineModeIsEnabled) for each in _chain(error)) or _lacks_xet(error):
        return False
    broken = (httpx.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)  # the latter two are xet's
    return any(isinstance(each, broken) and not isinstance(each, BrokenPipeError) for each in _chain(error))


def _lacks_xet(error: BaseException) -> bool:
    """Whether an endpoint was asked for xet's storage and knows of none; hf_xet has a text for it and no status."""
    return any("/xet-write-token/" in str(each) and re.search(r"\b404[ )]", str(each)) for each in _chain(error))


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until an error may have passed; None for one that stays."""
    answer = _answer(error)
    if answer is None:
        return 2.0 ** (attempt - 1) if _is_broken(error) else None
    if answer.status_code not in _PASSING:
        return None
    asked = answer.headers.get("Retry-After", "")
    limit = re.search(r"r=0;\s*t=(\d+)", answer.headers.get("RateLimit", ""))
    asked = asked if asked.isdigit() else limit[1] if limit else None
    return min(float(asked), _LONGEST) if asked else 2.0 ** (attempt - 1)


def _reason(error: Exception) -> str:
    code = status(error)
    return f"the Hub answered {code}" if code else "the connection to the Hub broke"


@contextmanager
def plain(id: str, reading: str | None = None) -> Iterator[None]:
    """Errors of the Hub, the network and the disk inside become an InputError of one line, without the token.

    Args: id: of the repository; reading: for who reads, and words that follow the id.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = _disk(error) or (_writing(error, id) if reading is None else _reading(error, id, reading))
        if text is None:
            raise
        raise InputError(_without_token(text)) from None  # what it came from may quote what was sent


def _disk(error: Exception) -> str | None:
    for each in _chain(error):
        if isinstance(each, OSError) and (reason := disk.REFUSED.get(each.errno)):
            place = Path(each.filename or constants.HF_HUB_CACHE)  # what is downloaded has no name in the error
            remedy = "free some space" if each.errno in disk.FULL else "allow it"
            if any(place.is_relative_to(folder) for folder in (constants.HF_HOME, constants.HF_HUB_CACHE)):
                return f"HF_HOME: cannot write {place}: {reason}; {remedy} or set HF_HOME elsewhere"
            return f"{place}: {reason}; {remedy} and give the same command again"
    return None


def _reading(error: Exception, id: str, words: str) -> str | None:
    if not (isinstance(error, HfHubHTTPError | HFValidationError | LocalEntryNotFoundError) or _is_broken(error)):
        return None
    if isinstance(error, RevisionNotFoundError):
        return f"revision: {id} has no{words.removeprefix(' at revision')}; see its tags on the Hub"
    give = "give the dataset folder of a finished run or ORG/NAME"
    if isinstance(error, HFValidationError):
        return f"{id}: no folder here, and no data set on the Hub can have this name; {give}"
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
        return f"{id}: no folder here, not in the cache{words}, and HF_HUB_OFFLINE is set; unset it, or {give}"
    return (
        f"{id}: neither a folder here nor a data set on the Hub{words} that can be reached ({first_line(error)}); "
        f"{give}, and log in with `hf auth login` if it is private"
    )


def _writing(error: Exception, id: str) -> str | None:
    code, endpoint = status(error), constants.ENDPOINT
    said = getattr(_answer(error), "headers", {}).get("X-Error-Message") or ""
    if _lacks_xet(error) and endpoint != constants._HF_DEFAULT_ENDPOINT:
        return f"HF_ENDPOINT: {endpoint} has no xet storage; set HF_HUB_DISABLE_XET=1 and give the same command again"
    if any(isinstance(each, OfflineModeIsEnabled) for each in _chain(error)):
        return "HF_HUB_OFFLINE: is set, and publishing needs the network; unset it"
    if "Invalid metadata in README.md" in str(error):
        return f"README.md: the Hub refuses its metadata: {error}; correct it and give the same command again"
    if code == 401:
        return f"HF_TOKEN: {endpoint} does not know the token (401); {_LOGIN}"
    if code == 403:
        return f"{id}: the token may not write there (403: {said}); {_LOGIN}, or write another name before the /"
    if isinstance(error, RepositoryNotFoundError):
        return f"{id}: not found on {endpoint}, or the token may not see it; {_LOGIN}"
    if code is not None:
        return f"{id}: {endpoint} answered {code} {said or first_line(error)}; give the same command again to go on"
    if _is_broken(error):
        return (
            f"HF_ENDPOINT: {endpoint} cannot be reached ({first_line(error)}); look at the network and give the same "
            "command again to go on"
        )
    return None


def _without_token(text: str) -> str:
    try:
        token = get_token()
    except OSError:  # a file that cannot be read, so nothing of it was sent
        token = None
    return " ".join((text.replace(token, "hf_…") if token else text).split())


def may_write(id: str, say: Say = quiet) -> None:
    """Raises InputError where there is no token, or where it says that it may not write to `id`."""
    if to_send() is None:
        raise InputError(f"HF_TOKEN: no token, and only its owner may write to {id}; {_LOGIN}")
    with plain(id):
        me = steady(HfApi().whoami, say)
    access = me.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise InputError(f"HF_TOKEN: the token may only read; {_LOGIN}")
    if access.get("role") == "fineGrained":
        places = writable(access)
        if id.split("/")[0] not in {place.split("/")[0] for place in places}:
            where = ", ".join(places) or "nowhere"
            raise InputError(f"HF_TOKEN: the token may write to {where}, not to {id}; give it repo.write there")
    names = [me["name"], *(org["name"] for org in me.get("orgs", []))]
    if me.get("type") == "user" and id.split("/")[0] not in names:
        raise InputError(f"{id}: {me['name']} may not write there; write one of {', '.join(names)} before the /")


def writable(access: dict[str, Any]) -> list[str]:
    """The users, organisations and repositories that a fine-grained token may write to, by what the Hub says of it."""
    scopes = access.get("fineGrained", {}).get("scoped", [])
    return [scope["entity"].get("name", "?") for scope in scopes if "repo.write" in scope.get("permissions", [])]


def to_send() -> str | None:
    """The token that requests carry. Raises InputError for one that cannot be read or sent."""
    try:
        token = get_token()
    except OSError as error:
        raise InputError(
            f"HF_TOKEN: {constants.HF_TOKEN_PATH} cannot be read ({error.strerror}); make it readable, or set HF_TOKEN"
        ) from error
    if token is not None and not re.fullmatch("[!-~]+", token):  # the client would put it into its message
        raise InputError("HF_TOKEN: the token has characters that no token has; log in with `hf auth login`")
    return token
