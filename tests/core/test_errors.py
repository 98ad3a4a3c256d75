"""Messages of errors: no user and no password of an address stands in any."""

import copy
import pickle

import nfzoo.errors
from nfzoo.errors import NfzooError, without_credentials
from tests.support.loops import each

ERRORS = [value for value in vars(nfzoo.errors).values() if isinstance(value, type) and issubclass(value, NfzooError)]


@each(
    ("text", "shown"),
    [
        ("https://me:secret@mirror.org:8/F1 is not there", "https://mirror.org:8/F1 is not there"),
        ("proxies http://me:s%40cret@a/ and socks5://token@b", "proxies http://a/ and socks5://b"),
        ("'https://me:sec@ret@mirror.org'", "'https://mirror.org'"),
        ("write to me@mirror.org, https://mirror.org/a@b", "write to me@mirror.org, https://mirror.org/a@b"),
    ],
)
def test_credentials_are_left_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@each("kind", ERRORS)
def test_no_error_tells_them(kind: type[NfzooError]) -> None:
    more = (15,) if kind is nfzoo.errors.Stopped else ()
    error = kind("no answer of https://me:secret@mirror.org/x", *more)
    assert str(error) == "no answer of https://mirror.org/x"
    if not more:
        assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)
