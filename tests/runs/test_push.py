"""`export --push`: what is asked of the hub, private unless said otherwise, and nothing where it can't
work.
"""

from types import SimpleNamespace

import pytest
from helpers import learnt, main_ends
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import httpx

from codyra_llm.checkpoints import push as hub


@pytest.fixture(scope="module")
def run(tiny_llama, toy_stream, tmp_path_factory):
    return learnt(
        tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "run", {"name": "seqlora", "rank": 4}
    )


@pytest.fixture
def calls(monkeypatch):
    """The calls of a stand-in for the hub, which knows the repositories in `private` by name; `fails`: of the
    upload.
    """
    made = SimpleNamespace(list=[], private={}, fails=None)

    class Api:
        def repo_info(self, repo):
            if repo == "me/away":
                raise httpx.ConnectError("no route")
            if repo not in made.private:
                raise RepositoryNotFoundError(
                    "404", response=httpx.Response(404, request=httpx.Request("GET", "http://hub"))
                )
            return SimpleNamespace(private=made.private[repo])

        def create_repo(self, repo, private, exist_ok):
            made.list.append(("create", repo, private, exist_ok))
            return type("Url", (str,), {"repo_id": repo})(f"https://hub/{repo}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            if made.fails:
                raise made.fails
            made.list.append(("upload", repo_id, {p.name for p in folder_path.iterdir()}))

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return made


def pushed(run, out, *options):
    return main_ends(["export", str(run.path), str(out), *options])


def test_an_export_is_pushed_with_its_card(run, calls, tmp_path, capsys):
    assert pushed(run, tmp_path / "a", "--push", "me/mine") == 0
    assert calls.list[0] == ("create", "me/mine", True, True)
    kind, repo, files = calls.list[1]
    assert (kind, repo) == ("upload", "me/mine") and files >= {
        "README.md",
        "model.safetensors",
        "config.json",
    }
    assert "pushed: https://hub/me/mine" in capsys.readouterr().out
    calls.private["me/open"] = False
    assert pushed(run, tmp_path / "b", "--push", "me/open", "--public", "--format", "peft") == 0
    assert (
        calls.list[2] == ("create", "me/open", False, True)
        and "adapter_model.safetensors" in calls.list[3][2]
    )
    assert pushed(run, tmp_path / "c") == 0 and len(calls.list) == 4  # nothing is pushed unasked


def test_a_public_repository_is_not_pushed_to_by_accident(run, calls, tmp_path, capsys):
    calls.private["me/open"] = False
    assert pushed(run, tmp_path / "a", "--push", "me/open") == 2
    assert "me/open is public; give --public" in capsys.readouterr().err and not calls.list
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "failure, reason",
    [
        (httpx.ConnectError("no route to host"), "no route to host"),
        (OSError("disk went away"), "disk went away"),
        (ValueError("Invalid metadata in README.md.\n- it"), "Invalid metadata"),
    ],
)
def test_a_hub_that_fails_is_one_sentence_and_the_export_stays(run, calls, tmp_path, capsys, failure, reason):
    calls.fails = failure
    assert pushed(run, tmp_path / "a", "--push", "me/mine") == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and (tmp_path / "a" / "README.md").is_file()


def test_what_cannot_work_is_said_before_anything_is_written(run, calls, tmp_path, capsys, monkeypatch):
    for repo, change, message in (
        ("a b//c", (), "is not a name of a repository"),
        ("mine", (), "is not a name of a repository"),
        ("me/away", (), "does not say whether me/away is public (no route)"),
        ("me/mine", (hub, "get_token", lambda: None), "there is no token"),
        ("me/mine", (constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
    ):
        if change:
            monkeypatch.setattr(*change)
        assert pushed(run, tmp_path / "a", "--push", repo) == 2
        error = capsys.readouterr().err
        assert (
            message in error and error.count("\n") == 1 and not (tmp_path / "a").exists() and not calls.list
        )
