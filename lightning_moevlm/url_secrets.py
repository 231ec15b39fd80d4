"""What in an address is a secret: what stands before the @ of its host, and its query, where signatures stand."""

import re

MASK = "***"
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
_QUERY = re.compile(r"(://[^\s?#'\"<>]*\?)[^\s#'\"<>)\]]+")


def without_url_secrets(text: str) -> str:
    """Return a text with the credentials (`//user:password@`) and queries (`?...`) of the URLs in it replaced."""
    return _QUERY.sub(rf"\1{MASK}", _CREDENTIALS.sub(MASK, text))
