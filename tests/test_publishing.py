"""What publishes the book: workflows, addresses, the joined page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "_ext"), str(ROOT / "tools")]
import print_book  # noqa: E402
import site_links  # noqa: E402

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

each_workflow = pytest.mark.parametrize(
    "path", WORKFLOWS, ids=lambda path: path.stem
)


# -------------------------------------------------------------- workflows


def test_a_linter_finds_nothing_in_the_workflows():
    zizmor = shutil.which("zizmor", path=str(Path(sys.executable).parent))
    command = [zizmor, "--offline", "--no-progress", "--format=json"]
    command.append(str(ROOT / ".github"))
    run = subprocess.run(command, capture_output=True, check=False)
    found = json.loads(run.stdout)
    said = [f"{f['ident']}: {f['desc']}" for f in found]
    assert said == []
    assert run.returncode == 0


@each_workflow
def test_actions_are_pinned_by_commit(path):
    used = re.findall(r"uses: *(.*)", path.read_text("utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(
            r"actions/[\w-]+@[0-9a-f]{40} # v[\d.]+", action
        )


@each_workflow
def test_a_workflow_may_no_more_than_it_needs(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        writes = {k for k, v in job["permissions"].items() if v == "write"}
        may = {"pages", "id-token"} if name == "deploy" else set()
        assert writes <= may
        assert job["timeout-minutes"] <= 45


def test_what_is_published_was_tested():
    workflow = yaml.safe_load(
        (ROOT / ".github/workflows/publish.yml").read_text()
    )
    assert workflow["jobs"]["deploy"]["needs"] == "build"
    runs = [s.get("run") for s in workflow["jobs"]["build"]["steps"]]
    assert ".ci/run" in runs


def test_dependabot_stays_on_jupyter_book_1():
    settings = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())
    pip = next(
        u for u in settings["updates"] if u["package-ecosystem"] == "pip"
    )
    ignored = {i["dependency-name"]: i["versions"] for i in pip["ignore"]}
    assert ignored["jupyter-book"] == [">=2"]


def test_the_canary_drops_the_pins_and_keeps_jupyter_book_1():
    workflow = (ROOT / ".github/workflows/canary.yml").read_text("utf-8")
    script = re.search(r"sed -E '(.*?)'", workflow)[1]
    made = subprocess.run(
        ["sed", "-E", script, str(ROOT / "requirements.txt")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    lines = [line for line in made if line.strip()]
    assert "torch" in lines
    assert "-e ." in lines
    pinned = [line for line in lines if "==" in line]
    assert len(pinned) == 1
    assert pinned[0].startswith("jupyter-book==1.")


def test_binder_has_the_environment_of_the_book():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    assert "-r ../requirements.txt" in lines
    runtime = (ROOT / ".binder" / "runtime.txt").read_text().strip()
    assert runtime == "python-3.11"


# -------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, ""),
        ({"GITHUB_REPOSITORY": ""}, ""),
        ({"GITHUB_REPOSITORY": "Ann/Book"}, "https://ann.github.io/Book/"),
        (
            {"GITHUB_REPOSITORY": "Ann/ann.github.io"},
            "https://ann.github.io/",
        ),
        (
            {"GITHUB_REPOSITORY": "a/b", "BOOK_URL": "https://x.y"},
            "https://x.y/",
        ),
    ],
)
def test_the_address_comes_from_the_repository(environ, address):
    assert site_links.site_address(environ) == address


def test_an_unknown_repository_has_no_buttons():
    assert site_links.repository({}) == {}
    known = site_links.repository({"GITHUB_REPOSITORY": "ann/book"})
    assert known["repository_url"] == "https://github.com/ann/book"
    assert set(known["launch_buttons"]) >= {"binderhub_url", "colab_url"}


def test_a_title_is_written_without_tex():
    assert site_links.plain(r"\operatorname{LSE}(z_{i})") == "LSE(z_i)"


# ------------------------------------------------------------ one document


@pytest.fixture
def joined(tmp_path):
    def page(body):
        return f'<article class="bd-article">{body}</article>'

    (tmp_path / "part").mkdir()
    (tmp_path / "index.html").write_text(
        page(
            '<h1>First<a class="headerlink" href="#">#</a></h1>'
            '<a href="part/two.html#there">there</a><a href="#here">here</a>'
            '<p id="here"><img src="_images/a.svg" alt="a"></p>'
        )
    )
    (tmp_path / "part" / "two.html").write_text(
        page(
            '<h1>Second</h1><p id="there"></p><a href="../index.html">up</a>'
            '<a href="https://example.org/a.html#b">out</a>'
            '<img src="../_images/b.svg" alt="b"><script>no()</script>'
        )
    )
    parts = [("", ["index"]), ("A part", ["part/two"])]
    return print_book.join(parts, tmp_path)


def test_links_of_the_joined_page_stay_in_it(joined):
    ids = re.findall(r' id="([^"]*)"', joined)
    assert len(ids) == len(set(ids))
    inner = re.findall(r'href="#([^"]*)"', joined)
    assert set(inner) <= set(ids)
    assert "part-two--there" in inner
    assert "index--here" in inner
    assert 'href="https://example.org/a.html#b"' in joined
    assert re.findall(r'src="([^"]*)"', joined) == [
        "_images/a.svg",
        "_images/b.svg",
    ]
    assert "<script" not in joined


def test_the_joined_page_begins_with_its_contents(joined):
    contents = re.search(r"<nav.*?</nav>", joined)[0]
    assert '<a href="#index">First</a>' in contents
    assert "A part" in contents
    assert '<a href="#part-two">Second</a>' in contents
