"""A secret is taken out of what echoes it, in any form that can be turned back; nothing else is."""

from __future__ import annotations

import base64
import json
import re
import string
from collections.abc import Callable
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faletl.redaction import MIN_SECRET_CHARACTERS, REDACTED, without

SECRET = "9f5ec7e70f5e/c7e77e+577e577e577e99"  # noqa: S105  # of nobody

ESCAPES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper case": str.upper,
    "as JSON escapes": lambda text: "".join(f"\\u{ord(one):04x}" for one in text),
    "as JSON escapes in capitals": lambda text: "".join(f"\\u00{ord(one):02X}" for one in text),
    "as JSON escapes in JSON": lambda text: "".join(f"\\\\u{ord(one):04x}" for one in text),
    "with slashes escaped": lambda text: text.replace("/", "\\/"),
    "percent-encoded": lambda text: "".join(f"%{ord(one):02x}" for one in text),
    "every other character percent-encoded": lambda text: "".join(
        f"%{ord(one):02X}" if number % 2 else one for number, one in enumerate(text)
    ),
    "as hex": lambda text: text.encode().hex(),
    "as hex in capitals": lambda text: text.encode().hex().upper(),
    "in base64": lambda text: base64.b64encode(b"Key " + text.encode()).decode(),
    "in base64 of URLs": lambda text: base64.urlsafe_b64encode(b"x" + text.encode()).decode(),
    "in base64 in a URL": lambda text: quote(base64.b64encode(text.encode()).decode(), safe=""),
    "in base64, slashes escaped": lambda text: (
        base64.b64encode(text.encode()).decode().replace("/", "\\/")
    ),
}

TEXTS = st.text(
    string.ascii_letters + string.digits + "-_+/=.:", min_size=MIN_SECRET_CHARACTERS, max_size=60
)
"""What fal's keys are made of, and more."""


@pytest.mark.parametrize("form", ESCAPES)
def test_redaction_finds_a_secret_in_every_form(form: str) -> None:
    body = f'{{"label":"before {ESCAPES[form](SECRET)} behind","cost":1.5}}'.encode()
    left = without(body, [SECRET])
    assert REDACTED.encode() in left
    assert left.startswith(b'{"label":"')
    assert left.endswith(b'","cost":1.5}')
    assert not readable(left, SECRET)


@given(st.data(), TEXTS)
def test_redaction_finds_a_secret_whose_characters_are_escaped_in_any_mixture(
    data: st.DataObject, secret: str
) -> None:
    forms: list[Callable[[str], str]] = [
        str,
        str.swapcase,
        lambda one: f"\\u{ord(one):04x}",
        lambda one: f"%{ord(one):02X}",
    ]
    echoed = "".join(data.draw(st.sampled_from(forms))(one) for one in secret)
    assert without(f"<{echoed}>".encode(), [secret]) == f"<{REDACTED}>".encode(), (secret, echoed)


@given(st.binary(max_size=300), TEXTS)
def test_redaction_leaves_what_holds_no_secret_as_it_is(body: bytes, secret: str) -> None:
    if not readable(body, secret):
        assert without(body, [secret]) == body


def test_redaction_leaves_short_texts_alone() -> None:
    assert without(b"a page with abc", ["abc"]) == b"a page with abc"


def test_redaction_of_a_page_keeps_it_json() -> None:
    page = {"rows": [{"label": f"Key {SECRET}", "cost": 0.1}, {"label": "é\\u0041 50 %41", "cost": 2}]}
    left = json.loads(without(json.dumps(page).encode(), [SECRET]))
    page["rows"][0]["label"] = f"Key {REDACTED}"
    assert left == page


def readable(body: bytes, secret: str) -> bool:
    """Whether somebody can turn any of it back: by code that is not the one that is tested."""
    undone = re.sub(rb"\\+u00(..)", lambda m: unquote_to_bytes(b"%" + m[1]), body, flags=re.DOTALL)
    texts = [body, undone, unquote_to_bytes(undone), unquote_to_bytes(undone).replace(b"\\", b"")]
    folded = b"\n".join(texts).lower()
    shown = [secret.lower().encode(), secret.encode().hex().encode()]
    coded = [base64.b64encode(b"\0" * lead + secret.encode()).rstrip(b"=")[4:-4] for lead in range(3)]
    coded += [one.replace(b"+", b"-").replace(b"/", b"_") for one in coded]
    return any(one in folded for one in shown) or any(
        len(one) >= MIN_SECRET_CHARACTERS and one in b"\n".join(texts) for one in coded
    )
