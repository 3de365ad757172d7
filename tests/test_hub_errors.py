"""Interrupted and refused publishing on the Hub: a repetition continues, and an error is one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunScript
from hub_fixtures import READ_TOKEN, TOKEN, Push, changed_model, checked, commit_all, git, refused
from hub_server import HubServer
from paths import REPOSITORY

from healthslm.errors import UserError
from healthslm.hub.errors import TOKENS_PAGE
from healthslm.hub.options import PushOptions
from healthslm.hub.publish import push_to_hub

pytest_plugins = "hub_fixtures"


def test_an_upload_that_was_killed_is_repeated_by_the_same_command(
    hub: HubServer, push: Push, root: Path, environment: dict[str, str]
) -> None:
    hub.storage.clear()
    hub.faults["PUT storage"] = ["hold"]
    script = REPOSITORY / "scripts/push_to_hub.py"
    command = [sys.executable, str(script), "lab/killed", "--root", str(root)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)
    assert hub.holding.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.repositories["lab/killed"].files == {}
    done = push("lab/killed")
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories["lab/killed"].commits) == 2
    assert hub.repositories["lab/killed"].files["model.safetensors"] == (root / "model.safetensors").read_bytes()


def test_an_upload_that_the_network_cuts_once_continues(hub: HubServer, push: Push, root: Path) -> None:
    hub.storage.clear()
    hub.faults["PUT storage"] = ["cut"]
    done = push("lab/cut", "--public")
    assert done.returncode == 0, done.stderr
    assert not hub.repositories["lab/cut"].private
    assert hub.repositories["lab/cut"].files["model.safetensors"] == (root / "model.safetensors").read_bytes()


ERRORS: dict[str, tuple[str, dict[str, str], str]] = {
    "no token": ("lab/new", {"HF_TOKEN": ""}, "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
    "wrong token": ("lab/new", {"HF_TOKEN": "hf_wrong"}, "the Hub refuses the token"),
    "read-only token": ("reader/new", {"HF_TOKEN": READ_TOKEN}, "the token can only read"),
    "other owner": ("other/new", {}, "other/new: the token belongs to someone, who can't publish as other"),
    "name taken": ("lab/taken", {}, "lab/taken: exists already with other files"),
    "public": ("lab/open", {}, "lab/open: is public on the Hub: add --public"),
}


@pytest.mark.parametrize("problem", ERRORS)
def test_a_problem_is_one_line_and_changes_nothing(hub: HubServer, push: Push, problem: str) -> None:
    hub.add_repository("lab/taken", files={"README.md": b"# Another model"})
    hub.add_repository("lab/open", private=False)
    name, settings, message = ERRORS[problem]
    done = push(name, **settings)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert name not in hub.repositories or "model.safetensors" not in hub.repositories[name].files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the Hub can't be reached in offline mode: unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "lab/new: the connection to the Hub failed (ConnectError)"),
    ],
)
def test_a_hub_out_of_reach_is_one_line(
    run_script: RunScript, environment: dict[str, str], root: Path, settings: dict[str, str], message: str
) -> None:
    done = checked(run_script("push_to_hub", "lab/new", "--root", root, env=environment | settings))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


AGAIN = "run the command again, which sends what is missing"
REFUSALS = {
    ("POST create", 403): f"the token may not write there (out of order): use one that can, see {TOKENS_PAGE}",
    ("PUT storage", 403): f"an upload to the Hub failed (HfHubHTTPError): {AGAIN}",
    ("POST commit", 500): "the Hub answered 500 (out of order): run the command again later",
}


@pytest.mark.parametrize(("request_", "status"), REFUSALS)
def test_a_refused_request_is_one_line(hub: HubServer, push: Push, request_: str, status: int) -> None:
    hub.storage.clear()
    hub.faults[request_] = [status]
    done = push("lab/fault")
    message = f"error: lab/fault: {REFUSALS[request_, status]}"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)
    assert "lab/fault" not in hub.repositories or hub.repositories["lab/fault"].files == {}


def test_uncommitted_changes_are_not_published(clone: Path) -> None:
    (clone / "README.md").write_text("# Draft\n")
    assert "README.md has uncommitted changes" in refused(clone)


def test_ignored_files_are_not_published_although_git_tracks_them(clone: Path) -> None:
    (clone / "tokens").mkdir()
    (clone / "tokens/train.bin").write_bytes(b"tokens")
    git(clone, "add", "--force", "tokens/train.bin")
    git(clone, "commit", "--quiet", "--message", "Tokens")
    assert "tokens/train.bin: git tracks it, but .gitignore excludes it" in refused(clone)


def test_a_folder_that_is_not_a_clone_is_refused(tmp_path: Path) -> None:
    assert "publish from a git clone" in refused(tmp_path)


def test_results_of_other_weights_are_not_published(clone: Path) -> None:
    changed_model().save_pretrained(clone)
    commit_all(clone)
    assert "results of other weights" in refused(clone)


@pytest.mark.parametrize("name", ["tiny", "lab/tiny/x", "lab/ti ny"])
def test_an_impossible_name_is_refused(clone: Path, name: str) -> None:
    with pytest.raises(UserError, match="^repository: "):
        push_to_hub(PushOptions(repository=name, root=clone))


def test_a_file_with_the_token_is_not_published(hub: HubServer, push: Push, clone: Path) -> None:
    (clone / "notes.txt").write_text(f"token: {TOKEN}\n")
    commit_all(clone)
    done = push("lab/leak", root=clone)
    assert done.returncode == 1
    assert done.stderr.startswith("error: notes.txt: contains the token")
    assert "lab/leak" not in hub.repositories
