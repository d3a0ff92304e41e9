"""The commit a training or evaluation record names: marked where tracked files differ, and known without a history."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))


from train import commit, environment  # noqa: E402

NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    run = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder outside every repository, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def repository(folder):
    """A repository of one tracked file."""
    git(folder, "init", "--quiet")
    (folder / "tracked.txt").write_text("one\n")
    git(folder, "add", "tracked.txt")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


@NEEDS_GIT
def test_clean_tree(repository):
    assert commit() == git(repository, "rev-parse", "HEAD")


@NEEDS_GIT
def test_untracked_files_do_not_count(repository):
    (repository / "result.json").write_text("{}")
    assert commit() == git(repository, "rev-parse", "HEAD")


@NEEDS_GIT
@pytest.mark.parametrize("staged", [False, True])
def test_changed_tracked_files_are_marked(repository, staged):
    (repository / "tracked.txt").write_text("two\n")
    if staged:
        git(repository, "add", "tracked.txt")
    assert commit() == f"{git(repository, 'rev-parse', 'HEAD')}-dirty"
    assert environment()["commit"].endswith("-dirty")


@pytest.mark.parametrize("installed", [pytest.param(True, marks=NEEDS_GIT), False])
def test_without_a_history_the_file_says_it(folder, monkeypatch, installed):
    if not installed:
        monkeypatch.setenv("PATH", str(folder))
    assert commit() == "unknown"
    (folder / ".commit").write_text("0123456789abcdef-dirty\n")
    assert commit() == "0123456789abcdef-dirty"


@NEEDS_GIT
def test_a_note_of_a_commit_that_the_history_lacks_is_believed(repository):
    (repository / ".commit").write_text("0123456789abcdef\n")
    assert commit() == "0123456789abcdef"
    (repository / ".commit").write_text(git(repository, "rev-parse", "HEAD") + "-dirty\n")
    assert commit() == git(repository, "rev-parse", "HEAD")
