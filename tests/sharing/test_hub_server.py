"""The test server answers the Hub's real client as the Hub does."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

REPO = "user/model"
BRACES_OID = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # `printf {} | git hash-object --stdin`


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """Let the client open connections, without tokens and caches from elsewhere."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def impatient(monkeypatch):
    """Let the client retry at once; otherwise it would wait 23 s in all."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def stranger(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.other_token)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with a card, a config, a picture in a folder below, and two shards."""
    folder = tmp_path / "folder"
    (folder / "pictures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "config.json").write_text("{}")
    (folder / "pictures/sheet.png").write_bytes(b"\x89PNG\0" + bytes(range(256)))
    (folder / "shard-1.safetensors").write_bytes(b"1" * 70_000)
    (folder / "shard-2.safetensors").write_bytes(b"2" * 80_000)
    return folder


@pytest.fixture
def repo(hub, api, folder):
    """A repository on the server that holds the folder."""
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    hub.requests.clear()
    return hub.repos[REPO]


def contents(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder without `.gitattributes`, which the server adds."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def uploads(hub: HubServer) -> list[str]:
    """The SHA-256 of each large file that the client began to send."""
    return [path.split("/")[-1] for method, path in hub.requests if method == "PUT"]


def change(path: str, content: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


def test_pushed_files_are_pulled_unchanged(hub, api, folder):
    url = api.create_repo(REPO)
    info = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first", commit_description="why")

    assert url == f"{hub.endpoint}/{REPO}" and url.repo_id == REPO
    commit = hub.repos[REPO].log()[0]
    assert (commit.id, commit.title, commit.message, commit.author) == (info.oid, "first", "why", "user")
    assert {path for path, blob in commit.files.items() if blob.lfs} == {
        "pictures/sheet.png",
        "shard-1.safetensors",
        "shard-2.safetensors",
    }
    assert contents(snapshot_download(REPO, endpoint=hub.endpoint)) == contents(folder)


def test_a_repository_is_created_once(hub, api, stranger):
    assert api.whoami()["name"] == "user" and stranger.whoami()["name"] == "other"
    api.create_repo("model")  # in the user's namespace
    api.create_repo(REPO, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_repo("user/other-model")
    assert [commit.title for commit in hub.repos[REPO].commits] == ["initial commit"]
    api.delete_repo(REPO)
    assert not hub.repos and not api.repo_exists(REPO)


def test_a_repository_is_described_as_the_hub_describes_it(api, repo):
    info = api.model_info(REPO, files_metadata=True)
    shard = next(file for file in info.siblings if file.rfilename == "shard-1.safetensors")
    assert (info.id, info.sha, info.private, info.gated) == (REPO, repo.log()[0].id, False, False)
    assert (shard.size, shard.lfs.size, shard.lfs.pointer_size) == (70_000, 70_000, 130)

    assert [entry.path for entry in api.list_repo_tree(REPO)] == [
        ".gitattributes",
        "README.md",
        "config.json",
        "pictures",
        "shard-1.safetensors",
        "shard-2.safetensors",
    ]
    assert [entry.path for entry in api.list_repo_tree(REPO, "pictures")] == ["pictures/sheet.png"]
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert tree["config.json"].blob_id == BRACES_OID and tree["config.json"].last_commit.title == "first"
    assert tree["pictures"].tree_id and tree[".gitattributes"].last_commit.title == "initial commit"
    assert len(tree) == 7
    assert [entry.path for entry in api.get_paths_info(REPO, ["config.json", "pictures", "none"])] == [
        "config.json",
        "pictures",
    ]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "none"))

    commits = api.list_repo_commits(REPO)
    assert [(commit.title, commit.authors) for commit in commits] == [
        ("first", ["user"]),
        ("initial commit", ["system"]),
    ]


def test_pushing_the_same_files_again_makes_no_commit(hub, api, repo, folder):
    before = repo.log()[0]
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == before.id
    assert repo.log()[0] is before and not uploads(hub)

    (folder / "config.json").write_text("{ }")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert repo.log()[0].files["config.json"].content == b"{ }"
    assert len(repo.commits) == 3 and not uploads(hub)


def test_each_revision_keeps_its_content(hub, api, repo):
    def config(revision: str) -> str:
        return Path(hf_hub_download(REPO, "config.json", revision=revision, endpoint=hub.endpoint)).read_text()

    first = repo.log()[0].id
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="feature/x")
    api.create_branch(REPO, branch="feature/x", exist_ok=True)
    api.create_commit(REPO, change("config.json", b"[]"), commit_message="main")
    api.create_commit(REPO, change("config.json", b"[1]"), commit_message="branch", revision="feature/x")

    assert config("main") == "[]" and config("feature/x") == "[1]"
    assert config("v1") == config(first) == "{}"
    refs = api.list_repo_refs(REPO)
    assert [branch.name for branch in refs.branches] == ["main", "feature/x"]
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="feature/x")
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, change("config.json", b"[2]"), commit_message="a tag is not a branch", revision="v1")


def test_errors_name_what_does_not_exist(hub, api, repo):
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="none", endpoint=hub.endpoint)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="none", endpoint=hub.endpoint)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=REPO, revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "none.json", endpoint=hub.endpoint)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        api.model_info("user/none")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        hf_hub_download("user/none", "config.json", endpoint=hub.endpoint)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id="user/none")


def test_only_the_owner_reads_and_writes_a_private_repository(hub, api, stranger, folder):
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)

    assert api.model_info(REPO).private
    assert contents(snapshot_download(REPO, endpoint=hub.endpoint, token=hub.token)) == contents(folder)
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    for token, status in ((False, 401), (hub.other_token, 404)):
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            snapshot_download(REPO, endpoint=hub.endpoint, token=token)
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            hf_hub_download(REPO, "config.json", endpoint=hub.endpoint, token=token)
    with pytest.raises(RepositoryNotFoundError):
        stranger.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=REPO)


def test_a_wrong_token_is_refused_even_where_no_token_is_needed(hub, repo):
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        snapshot_download(REPO, endpoint=hub.endpoint, token="hf_wrong")
    assert refused.value.response.status_code == 401 and not isinstance(refused.value, RepositoryNotFoundError)


def test_strangers_see_a_gated_repository_but_cannot_download_it(hub, api, stranger, repo):
    repo.gated = True
    assert stranger.model_info(REPO).gated
    assert Path(api.hf_hub_download(REPO, "config.json")).read_text() == "{}"
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download(REPO, "README.md")


def test_a_pull_request_does_not_change_main(hub, api, stranger, repo):
    before = repo.log()[0]
    info = stranger.create_commit(REPO, change("config.json", b"[]"), commit_message="theirs", create_pr=True)
    second = api.create_commit(REPO, change("config.json", b"[2]"), commit_message="ours", create_pr=True)

    assert (info.pr_num, info.pr_revision, second.pr_revision) == (1, "refs/pr/1", "refs/pr/2")
    assert repo.log()[0] is before
    assert repo.log("refs/pr/1")[0].parent == before.id and repo.log("refs/pr/1")[0].author == "other"
    pulled = hf_hub_download(REPO, "config.json", revision="refs/pr/1", endpoint=hub.endpoint)
    assert Path(pulled).read_text() == "[]"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [request.ref for request in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_commit(REPO, change("config.json", b"[]"), commit_message="no write access")


def test_a_commit_on_an_outdated_parent_is_refused(api, repo):
    parent = repo.log()[0].id
    api.create_commit(REPO, change("config.json", b"[]"), commit_message="in time", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, change("config.json", b"[2]"), commit_message="late", parent_commit=parent)
    assert [commit.title for commit in repo.log()] == ["in time", "first", "initial commit"]


def test_deleted_files_are_gone(hub, api, repo):
    deletions = [CommitOperationDelete("config.json"), CommitOperationDelete("pictures/")]
    api.create_commit(REPO, deletions, commit_message="less")
    pulled = contents(snapshot_download(REPO, endpoint=hub.endpoint))
    assert set(pulled) == {"README.md", "shard-1.safetensors", "shard-2.safetensors"}
    assert "config.json" in repo.log()[1].files
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", REPO)


def test_an_interrupted_push_continues_where_it_stopped(hub, api, folder, impatient):
    api.create_repo(REPO)
    repo = hub.repos[REPO]
    hub.fail_after(1)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(repo.commits) == 1 and len(repo.objects) == 1
    finished = set(repo.objects)

    hub.recover()
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(uploads(hub)) == 2 and not finished & set(uploads(hub))
    assert contents(snapshot_download(REPO, endpoint=hub.endpoint)) == contents(folder)


def test_the_client_repairs_one_cut_connection_by_itself(hub, api, folder, impatient, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # only whole chunks are kept
    api.create_repo(REPO)
    hub.fail_after(1, times=1)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(uploads(hub)) == 4 and len(set(uploads(hub))) == 3

    hub.fail_after(0, method="GET", times=1)
    pulled = hf_hub_download(REPO, "shard-1.safetensors", endpoint=hub.endpoint)
    assert Path(pulled).read_bytes() == b"1" * 70_000
    assert sum(path.startswith("/storage/") for method, path in hub.requests if method == "GET") == 2


def test_an_expired_link_ends_the_push_at_once(hub, api, folder):
    api.create_repo(REPO)
    hub.fail_after(2, status=403)
    with pytest.raises(RuntimeError, match="Error while uploading") as failed:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert failed.value.__cause__.response.status_code == 403
    assert len(hub.repos[REPO].commits) == 1 and len(uploads(hub)) == 3


def test_large_files_are_sent_in_parts_from_another_host(hub, repo):
    url = f"{hub.endpoint}/{REPO}/resolve/main/shard-1.safetensors"
    head = get_session().head(url, follow_redirects=False)
    link = head.headers["Location"]
    assert head.status_code == 302 and head.headers["X-Repo-Commit"] == repo.log()[0].id
    assert head.headers["X-Linked-Size"] == "70000" and link.startswith(f"{hub.storage}/")
    part = get_session().get(link, headers={"Range": "bytes=69998-"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"11", "bytes 69998-69999/70000")
    assert get_session().get(link, headers={"Range": "bytes=70000-"}).status_code == 416
    assert get_session().get(link, headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
    assert get_session().get(link.split("?")[0]).status_code == 403


@pytest.fixture
def olah(tmp_path, folder):
    """The address of another implementation of the Hub, which serves the folder from a git repository."""
    if not (shutil.which("olah-cli") and shutil.which("git")):
        pytest.skip("needs git and the command `olah-cli` (pip install olah) on the PATH")
    repo = tmp_path / "mirrors" / "models" / "user" / "model"
    shutil.copytree(folder, repo)
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    for command in ("init -q -b main", "add -A", "commit -qm first", "tag v1"):
        subprocess.run(["git", *command.split()], cwd=repo, check=True, env=os.environ | identity)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/olah"\n'
        f'mirrors-path = ["{tmp_path}/mirrors"]\n[accessibility]\noffline = true\n'
    )
    command = ["olah-cli", "--config", str(config), "--log-path", str(tmp_path / "logs")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def test_another_server_gives_the_same_files(olah, hub, api, repo, folder):
    pulled = snapshot_download(REPO, revision="v1", endpoint=olah, cache_dir=folder.parent / "from-olah")
    assert contents(pulled) == contents(folder)
    theirs = {entry.path: entry for entry in HfApi(endpoint=olah).list_repo_tree(REPO, recursive=True)}
    ours = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert set(ours) - set(theirs) == {".gitattributes"}
    for path in ("config.json", "README.md"):
        assert (ours[path].size, ours[path].blob_id) == (theirs[path].size, theirs[path].blob_id)
