"""The token that goes with requests to the Hub: whether it can be sent, and where it may write."""

import re
from typing import Any

from huggingface_hub import HfApi, constants, get_token

from .errors import InputError
from .hub_errors import Say, plain, quiet, steady


def may_write(id: str, say: Say = quiet) -> None:
    """Raises InputError where there is no token, or where it says that it may not write to `id`."""
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    if to_send() is None:
        raise InputError(f"HF_TOKEN: no token, and only its owner may write to {id}; {login}")
    with plain(id):
        me = steady(HfApi().whoami, say)
    access = me.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise InputError(f"HF_TOKEN: the token may only read; {login}")
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
