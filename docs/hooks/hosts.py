"""What a page makes the browser fetch from other hosts."""

from __future__ import annotations

from html.parser import HTMLParser


def foreign(html: str) -> list[str]:
    """The addresses of scripts, styles, pictures and the like that are not the site's own."""
    loads = _Loads()
    loads.feed(html)
    return loads.found


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        fetched = given.get("href" if tag in ("link", "use", "image") else "src", "")
        named_only = tag == "link" and given.get("rel") in ("canonical", "prev", "next")
        if fetched.startswith(("http:", "https:", "//")) and not named_only:
            self.found.append(fetched)
