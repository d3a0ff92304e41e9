"""Files of records are never half written, and name the commit that ran: marked where tracked files differ from it."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from baatt.lab.records import RecordFile, commit_here, load_records, provenance, short_commit, stored_text, write_json

NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    run = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def commit(folder: Path) -> str | None:
    return commit_here(folder / "tracked.txt")


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
    assert commit(repository) == git(repository, "rev-parse", "HEAD")


@NEEDS_GIT
def test_untracked_files_do_not_count(repository):
    (repository / "result.json").write_text("{}")
    assert commit(repository) == git(repository, "rev-parse", "HEAD")


@NEEDS_GIT
@pytest.mark.parametrize("staged", [False, True])
def test_changed_tracked_files_are_marked(repository, staged):
    (repository / "tracked.txt").write_text("two\n")
    if staged:
        git(repository, "add", "tracked.txt")
    assert commit(repository) == f"{git(repository, 'rev-parse', 'HEAD')}-dirty"


@NEEDS_GIT
def test_a_foreign_checkout_says_nothing(repository):
    assert commit_here(repository / "untracked.txt") is None


@pytest.mark.parametrize("installed", [pytest.param(True, marks=NEEDS_GIT), False])
def test_without_a_history_the_file_says_it(folder, monkeypatch, installed):
    if not installed:
        monkeypatch.setenv("PATH", str(folder))
    assert commit(folder) is None
    (folder / ".commit").write_text("0123456789abcdef-dirty\n")
    assert commit(folder) == "0123456789abcdef-dirty"


@NEEDS_GIT
def test_a_note_of_a_commit_that_the_history_lacks_is_believed(repository):
    (repository / ".commit").write_text("0123456789abcdef\n")
    assert commit(repository) == "0123456789abcdef"
    (repository / ".commit").write_text(git(repository, "rev-parse", "HEAD") + "-dirty\n")
    assert commit(repository) == git(repository, "rev-parse", "HEAD"), "a known one is older than HEAD"


def test_this_checkout():
    found = provenance("baatt bench", torch.device("cpu"))
    assert list(found) == ["command", "commit", "device", "versions"]
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert found["device"].endswith(f"{torch.get_num_threads()} threads")
    assert set(found["versions"]) == {"baatt", "python", "torch"}


def test_commits_are_shortened():
    assert short_commit("0123456789abcdef") == "0123456789"
    assert short_commit("0123456789abcdef-dirty") == "0123456789-dirty"
    assert short_commit("0123456789abcdef+changes") == "0123456789-dirty", "the spelling of old files"
    assert short_commit("unknown") == short_commit(None) == "unknown"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": []}'])
def test_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"file.json must hold .* of `baatt bench`"):
        load_records(path, ("command", "records"), "`baatt bench`")


def test_a_file_is_whole_after_every_record(tmp_path):
    path = tmp_path / "file.json"
    file = RecordFile(path, {"seed": 1})
    for number in range(2):
        file.add({"number": number})
        assert json.loads(path.read_text()) == file.content
        assert len(file.content["records"]) == number + 1
        assert [one.name for one in tmp_path.iterdir()] == ["file.json"]
    assert load_records(path, ("seed", "records"), "this test") == file.content
    RecordFile(None, {}).add({})


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json({"old": 1}, path)
    with pytest.raises(TypeError):
        write_json({"new": object()}, path)
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_packed_file_is_read_by_its_own_name_and_by_that_of_what_is_in_it(tmp_path):
    path, packed = tmp_path / "found.json", tmp_path / "found.json.gz"
    packed.write_bytes(gzip.compress(b'{"records": [1]}'))
    for name in (path, packed):
        assert stored_text(name) == '{"records": [1]}'
        assert load_records(name, ("records",), "a command") == {"records": [1]}
    path.write_text('{"records": [2]}')  # a newer one beside it
    assert load_records(path, ("records",), "a command") == {"records": [2]}
    packed.write_bytes(packed.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"found.json.gz must hold the JSON of a command, got"):
        load_records(packed, ("records",), "a command")
    with pytest.raises(FileNotFoundError):
        stored_text(tmp_path / "other.json")
