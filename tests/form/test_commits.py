"""Commits that figures and notes name are in the history: a figure whose tree cannot be found again cannot be repeated."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *RESULTS.rglob("*.md")]
NUMBERS = sorted(RESULTS.rglob("*.json"))
# A word of seven hexadecimal digits or more, figures and letters mixed, as git shortens a commit.
SHORTENED = re.compile(r"(?<![\w.-])(?=\w*[0-9])(?=\w*[a-f])[0-9a-f]{7,40}(?![\w-])")
# Of vLLM and SGLang: what was read there is said in docs/saved_form.md.
OF_OTHERS = {"be696453", "b5535699"}


@pytest.fixture(scope="module")
def history() -> str:
    """Every commit that leads here, a line each."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    try:
        top, shallow = git("rev-parse", "--show-toplevel").strip(), git("rev-parse", "--is-shallow-repository").strip()
    except FileNotFoundError:
        pytest.skip("needs git")
    if not top or Path(top).resolve() != ROOT.resolve() or shallow != "false":
        pytest.skip("needs a checkout with its whole history")
    return "\n" + git("rev-list", "HEAD")


def commits_of(data: Any) -> Iterator[str]:
    """What stands under "commit", however deep."""
    if isinstance(data, dict):
        yield from (value for key, value in data.items() if key == "commit")
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from commits_of(part)


def test_commits_that_are_named_are_there(history: str) -> None:
    named = {(word, page.name) for page in PAGES for word in SHORTENED.findall(page.read_text())}
    assert len(named) > 30, "pages name commits in another way than this looks for"
    assert not [(word, page) for word, page in sorted(named) if word not in OF_OTHERS and f"\n{word}" not in history]


@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_numbers_name_the_commit_that_ran(numbers: Path, history: str) -> None:
    found = list(commits_of(json.loads(numbers.read_text())))
    assert found
    for commit in found:
        assert re.fullmatch("[0-9a-f]{10,40}", commit), f"{commit}: figures are of a commit alone"
        assert f"\n{commit}" in history
