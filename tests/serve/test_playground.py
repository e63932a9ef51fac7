"""The files of the playground: routes, headers, and what can be read off the files without a browser."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

pytest.importorskip("starlette")

from starlette.applications import Starlette
from starlette.testclient import TestClient

from refold.pages.palette import DARK, LIGHT
from refold.serve.playground import COLOURS, INDEX, POLICY, page_files, page_routes

FILES = page_files()
SCRIPTS = {name: file.content.decode() for name, file in FILES.items() if name.endswith(".js")}
STYLES = {name: file.content.decode() for name, file in FILES.items() if name.endswith(".css")}
CONTROLS = ("input", "select", "textarea")
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Collects the elements of the page: tags with their attributes, and the text of buttons and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.inline: list[str] = []
        self.feed(FILES[INDEX].content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style") and data.strip():
            self.inline.append(data)

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if not tags or tag in tags]

    @property
    def ids(self) -> list[str]:
        return [each["id"] for each in self.all() if "id" in each]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


def test_the_routes_are_the_files_and_nothing_else(client: TestClient) -> None:
    paths = {route.path for route in page_routes()}
    assert paths == {"/", *(f"/page/{name}" for name in FILES if name != INDEX)}
    assert {"/page/main.js", "/page/playground.css", f"/page/{COLOURS}", "/page/icon.svg"} <= paths
    for path in ("/page/", "/page/index.html", "/page/../playground.py", "/page/%2e%2e/app.py", "/page/missing.js"):
        assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_comes_with_its_headers(client: TestClient, name: str) -> None:
    path = "/" if name == INDEX else f"/page/{name}"
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.content == FILES[name].content
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    etag = answer.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.head(path).content == b""


def test_the_policy_allows_nothing_inline_and_nothing_from_outside() -> None:
    assert "unsafe" not in POLICY
    assert "*" not in POLICY
    assert "default-src 'none'" in POLICY


def test_nothing_is_inline(page: Page) -> None:
    assert page.inline == []
    for tag, attributes in page.elements:
        assert tag != "style"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    for source in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
        assert 'setAttribute("style"' not in source


def test_nothing_comes_from_outside(page: Page) -> None:
    for name, file in FILES.items():
        text = file.content.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(https?:)?//[\w-]+\.", text), name
        assert "@import" not in text
        assert "url(" not in text
    named = [each.get("src") or each["href"] for each in page.all("script", "link")]
    assert {each.removeprefix("page/") for each in named} <= set(FILES)


def test_imports_lead_to_files_and_exported_names() -> None:
    for name, source in SCRIPTS.items():
        for names, target in re.findall(r'import \{ ([^}]+) \} from "\./([\w.]+)";', source):
            for each in names.split(", "):
                assert re.search(rf"export (async )?(function\*?|class|const) {each}\b", SCRIPTS[target]), (name, each)
        assert source.count("import {") == len(re.findall(r'import \{ [^}]+ \} from "\./[\w.]+";', source))
        assert len(source.splitlines()) <= 400


def test_every_id_that_a_script_uses_exists(page: Page) -> None:
    ids = page.ids
    assert len(set(ids)) == len(ids)
    found = set()
    for source in SCRIPTS.values():
        found |= set(re.findall(r'element\("([\w-]+)"\)', source))
        found |= set(re.findall(r'["\s,]#([a-z][\w-]*)', source))
    assert len(found) > 30
    assert found <= set(ids)
    assert set(re.findall(r"#([a-z][\w-]*)[^{}]*\{", STYLES["playground.css"])) <= set(ids)


def test_references_between_elements_exist(page: Page) -> None:
    ids = set(page.ids)
    for each in page.all():
        for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls"):
            assert set(each.get(name, "").split()) <= ids
        if each.get("href", "").startswith("#"):
            assert each["href"][1:] in ids


def test_every_control_has_a_label(page: Page) -> None:
    labelled = {each["for"] for each in page.all("label")}
    controls = [each["id"] for each in page.all(*CONTROLS)]
    assert len(controls) >= 13
    assert set(controls) <= labelled
    assert all("aria-label" in each for each in page.all("canvas"))


def test_headings_language_and_skip_link(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("a")[0] == {"class": "skip", "href": "#prompt"}
    assert {"main", "header", "aside", "footer"} <= {tag for tag, _ in page.elements}


def test_colours_are_those_of_the_palette() -> None:
    written = dict(re.findall(r"--(\w+): light-dark\((#\w+), #\w+\);", STYLES[COLOURS]))
    assert written == dict(LIGHT)
    assert all(f", {colour});" in STYLES[COLOURS] for colour in DARK.values())
    used = set(re.findall(r"var\(--(\w+)\)", STYLES["playground.css"])) - {"share", "p"}
    assert used <= set(LIGHT)
    assert not re.search(r"#[0-9a-f]{3,8}\b(?![^{]*\{)", STYLES["playground.css"])
