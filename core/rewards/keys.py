"""Which API key may go to which server: the user says so outside of any graph, in one environment variable.

    TREERPO_KEYS="api.openai.com=OPENAI_API_KEY, judge.example:8443=JUDGE_API_KEY"

Each pair is host[:port]=NAME, where NAME is the environment variable that holds the key; without a port it is the
usual one (443 for https, 80 for http). A graph only chooses among the names tied to the host of its address: one from
a stranger, who writes the address as well, can send no key anywhere else.
"""

import ipaddress
import os
import re
import urllib.parse

TABLE = "TREERPO_KEYS"
NAMES = re.compile(r"(\w*API_KEY|TREERPO_\w+)", re.ASCII)  # of variables with keys; a pasted key is none of these
USUAL = {"http": 80, "https": 443}


def key_for(address: str, variable: str) -> str:
    """The key in the environment variable of this name, if it may go to this address; "" without a name.

    ValueError in one sentence otherwise. It tells nothing of a variable that is not tied to the host, and repeats no
    name that may be a pasted key.
    """
    if not variable:
        return ""
    if not NAMES.fullmatch(variable):
        raise ValueError(
            "key_variable takes the name of an environment variable that ends in API_KEY or begins with TREERPO_, "
            "such as OPENAI_API_KEY, never the key itself."
        )
    parts = urllib.parse.urlsplit(address)
    port = parts.port or USUAL[parts.scheme]
    if (parts.hostname, port, variable) not in _tied(parts.scheme):
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        pair = f"{host}{'' if port == USUAL[parts.scheme] else f':{port}'}={variable}"
        raise ValueError(
            f"No key goes to {host} until you say so outside of the graph: if you trust this server with the key in "
            f"{variable}, add {pair} to the environment variable {TABLE} (pairs are separated by commas) and start "
            "again."
        )
    if parts.scheme != "https" and not is_here(parts.hostname):
        raise ValueError(
            f"A key crosses a network only encrypted: give {parts.hostname} an address that begins with https://, or "
            "reach it by an SSH tunnel at 127.0.0.1."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            "The environment variable named in key_variable is not set: set it to the API key before ComfyUI starts."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "The API key in the environment variable named in key_variable has characters that no key has: check its "
            "value."
        )
    return key


def is_here(host: str) -> bool:
    """Whether this name or number is this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified


def _tied(scheme: str) -> set[tuple[str, int, str]]:
    """(host, port, variable) of every pair in the table. Its text is never repeated: a key may stand there."""
    found = set()
    for pair in filter(None, re.split(r"[,;\s]+", os.environ.get(TABLE, ""))):
        place, equals, variable = pair.rpartition("=")
        try:
            parts = urllib.parse.urlsplit(f"//{place}")
            host, port = parts.hostname, parts.port or USUAL[scheme]
        except ValueError:
            host = None
        if not (equals and host and parts.netloc == place and "@" not in place and NAMES.fullmatch(variable)):
            raise ValueError(
                f"The environment variable {TABLE} must hold pairs of a host and the name of a variable, such as "
                "api.openai.com=OPENAI_API_KEY, separated by commas."
            )
        found.add((host, port, variable))
    return found
