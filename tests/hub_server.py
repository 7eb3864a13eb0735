"""A small Hugging Face Hub on loopback, in memory, that the real `huggingface_hub` client pushes to and pulls from.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("user/model")
        api.upload_folder(repo_id="user/model", folder_path=folder)
        hub.repos["user/model"].log()[0].files["config.json"].content

Answers, headers and error codes are those of the Hub. So are its traps: a new repository has a first commit with
`.gitattributes`; a commit is made even when it changes nothing (the client leaves unchanged files out); large files
are stored under another host name, to which no token may be sent; a private repository looks absent to strangers.

A Space has the name "spaces/user/name" in `repos`.

Left out are datasets, the state of Spaces, discussions, Xet (the client needs HF_HUB_DISABLE_XET=1), uploads in parts,
paging, `.gitignore`, the metadata of cards, deleting refs, and everything that is not about files.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".h5", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
LFS_SIZE = 10 * 2**20  # a larger file is stored as LFS whatever its name is
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Answer(NamedTuple):
    """An answer to a request: bytes are sent as they are, anything else as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = {}


class HubError(Exception):
    """An answer other than success. The client chooses its exception by status and code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        self.answer = Answer({"error": message}, status, {"X-Error-Message": message, **codes, **(headers or {})})


def git_hash(kind: str, content: bytes) -> str:
    """The name of a git object. The client computes it for its files too, to see which have changed."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git holds it or, for a large file, a pointer to it."""

    content: bytes
    lfs: bool

    @cached_property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_hash("blob", self.content)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The Hub's description of the file, under the names that its endpoints use."""
        size = len(self.content)
        if not self.lfs:
            return {"size": size, "oid": self.etag, "blobId": self.etag}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {size}\n".encode()
        lfs = {"oid": self.etag, "sha256": self.etag, "size": size, "pointerSize": len(pointer)}
        return {"size": size, "oid": git_hash("blob", pointer), "blobId": git_hash("blob", pointer), "lfs": lfs}


@dataclass(frozen=True)
class Commit:
    """A snapshot: all files of the repository at one moment."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository: refs point to commits, commits hold files, and `objects` holds the complete large files."""

    id: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)  # those of all refs, oldest first
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main", "refs/tags/v1", "refs/pr/1" -> commit id
    objects: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content, before a commit holds it too

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None if there is none."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str = "main") -> Commit:
        """The commit of a branch, tag, pull request or id; 7 digits of an id suffice."""
        commit_id = self.refs.get(self.ref(revision) or "", revision)
        for commit in self.commits:
            if commit.id == commit_id or (len(commit_id) >= 7 and commit.id.startswith(commit_id)):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def log(self, revision: str = "main") -> list[Commit]:
        """The commit of a revision and all before it, newest first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.find(commits[-1].parent))
        return commits

    def commit(self, ref: str, parent: Commit | None, files: dict[str, Blob], **about: str) -> Commit:
        """Make a commit, and let `ref` point to it.

        Args:
            about: its title, message and author.
        """
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        parent_id = parent.id if parent else None
        commit_id = git_hash("commit", repr((parent_id, date, about, sorted(files))).encode())
        self.commits.append(Commit(commit_id, parent_id, date=date, files=files, **about))
        self.refs[ref] = commit_id
        return self.commits[-1]

    def last_change(self, path: str, revision: str) -> Commit:
        """The last commit that changed a file, or any file in a folder."""

        def part(commit: Commit) -> dict[str, str]:
            return {name: blob.etag for name, blob in commit.files.items() if f"{name}/".startswith(f"{path}/")}

        log = self.log(revision)
        return next((commit for commit, before in pairwise(log) if part(commit) != part(before)), log[-1])


@dataclass
class Outage:
    """Transfers of large files that fail, counted by method: those after `first`, up to `last`."""

    method: str
    first: int
    last: float
    status: int | None
    seen: int = 0

    def hits(self, method: str) -> bool:
        self.seen += method == self.method
        return method == self.method and self.first < self.seen <= self.last


class HubServer(ThreadingHTTPServer):
    """The server, which runs during its `with` block.

    `token` belongs to `user` and `other_token` to `other`. Each user writes in the namespace of that name only.
    """

    daemon_threads = True
    request_queue_size = 64  # the client opens many connections at once, and waits a second for a refused one

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Large files have the same socket under another host name. The client reads the headers X-Linked-* of a
        # redirect only if it leads to another host; it follows a redirect to the same host at once.
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.signature = secrets.token_hex()  # in links to large files, because storage takes no tokens
        self.token, self.other_token = "hf_token_of_user", "hf_token_of_other"
        self.users = {self.token: "user", self.other_token: "other"}
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # method and path of each, oldest first
        self.outage: Outage | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def fail_after(self, count: int, *, method: str = "PUT", times: float = inf, status: int | None = None) -> None:
        """Let `count` more uploads of large files succeed and the next `times` fail; downloads with method "GET".

        The connection is cut in the middle of the content, and the client retries for 23 s before it gives up. With a
        `status` such as 403, the answer of storage to an expired link, the client gives up at once.
        """
        self.outage = Outage(method, count, count + times, status)

    def recover(self) -> None:
        """End the failures of `fail_after`."""
        self.outage = None


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after another."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer, written as head and body, waits 40 ms for the client

    def log_message(self, *_: object) -> None:
        pass

    def dispatch(self) -> None:
        """Read a request, call the method for its path, and write the answer."""
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(url.path)))
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.server.lock:
            outage = self.server.outage if url.path.startswith("/storage/") else None
            failure = outage if outage is not None and outage.hits(self.command) else None
        cut = failure is not None and failure.status is None
        length = int(self.headers.get("Content-Length", 0))
        # Read even if no method uses it, because the rest of a body would be taken for the next request.
        self.body = self.rfile.read(length // 2 if cut else length)
        if len(self.body) < length:  # cut by this server or by the client
            self.close_connection = True
            return
        try:
            if failure is not None and failure.status is not None:
                raise HubError(failure.status, "Request has expired")
            answer = self.answer(url.path)
        except HubError as error:
            answer = error.answer
        self.write(answer, cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def answer(self, path: str) -> Answer:
        for methods, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                # The slashes of a revision arrive quoted, so parts are unquoted after the path was split.
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if groups.pop("kind", "models") == "spaces":
                    groups["repo_id"] = f"spaces/{groups['repo_id']}"
                with self.server.lock:
                    return handle(self, **groups)
        raise HubError(404, f"This test server has no {self.command} {path}")

    def write(self, answer: Answer, cut: bool) -> None:
        is_raw = isinstance(answer.content, bytes)
        body = answer.content if is_raw else json.dumps(answer.content).encode()
        self.send_response(answer.status)
        kind = "application/octet-stream" if is_raw else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def user(self, required: bool = True) -> str | None:
        """The user whose token came with the request; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise HubError(401, "Invalid username or password.")
        return self.server.users.get(token)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """The repository, if the user may read (or write) it. A private one looks absent to strangers."""
        user, owner = self.user(required=write), repo_id.removeprefix("spaces/").split("/")[0]
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            # Like the Hub, do not answer 404 without a token, because the repository might be private.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if write and user != owner and "create_pr" not in self.query:  # a pull request needs no write access
            raise HubError(403, f"You have no write access to {repo_id}")
        return repo

    # Accounts and repositories

    def whoami(self) -> Answer:
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return Answer({"type": "user", "name": self.user(), "fullname": self.user(), "orgs": [], "auth": access})

    def validate_yaml(self) -> Answer:
        """No complaints: the client itself has read the metadata with a YAML parser."""
        return Answer({"errors": [], "warnings": []})

    def wanted_repo_id(self, wanted: dict[str, Any]) -> str:
        namespace = wanted.get("organization") or self.user()
        if namespace != self.user():
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return f"{'spaces/' * (wanted.get('type') == 'space')}{namespace}/{wanted['name']}"

    def create_repo(self) -> Answer:
        wanted = json.loads(self.body)
        repo_id = self.wanted_repo_id(wanted)
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return Answer({"error": "You already created this model repo", **answer}, 409)
        repo = self.server.repos[repo_id] = Repo(repo_id, private=wanted.get("visibility") == "private")
        files = {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}
        repo.commit("refs/heads/main", None, files, title="initial commit", message="", author="system")
        return Answer(answer)

    def delete_repo(self) -> Answer:
        del self.server.repos[self.repo(self.wanted_repo_id(json.loads(self.body)), write=True).id]
        return Answer({})

    # Contents of a repository

    def model_info(self, repo_id: str, revision: str) -> Answer:
        repo = self.repo(repo_id)
        commit = repo.find(revision or "main")
        with_blobs = "blobs" in self.query
        siblings = [{"rfilename": path, **(blob.record if with_blobs else {})} for path, blob in commit.files.items()]
        about = {"id": repo_id, "author": repo_id.split("/")[0], "private": repo.private, "gated": repo.gated}
        about |= {"sha": commit.id, "lastModified": commit.date, "createdAt": repo.commits[0].date}
        return Answer({**about, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def entry(self, repo: Repo, revision: str, path: str, expand: bool) -> dict[str, Any] | None:
        """The Hub's description of a file or a folder; None if there is neither."""
        files = repo.find(revision).files
        inside = {name: blob.etag for name, blob in files.items() if name.startswith(f"{path}/")}
        if path not in files and not inside:
            return None
        entry = {"type": "directory", "path": path, "oid": git_hash("tree", repr(inside).encode()), "size": 0}
        if path in files:
            entry |= {"type": "file", **files[path].record}
        return entry | ({"lastCommit": commit_record(repo.last_change(path, revision))} if expand else {})

    def tree(self, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.repo(repo_id)
        prefix = f"{path}/" if path else ""
        inside = [name for name in repo.find(revision).files if name.startswith(prefix)]
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        names = set()
        for name in inside:
            parts = name.split("/")
            first = prefix.count("/") + 1
            last = len(parts) if self.query.get("recursive") == "true" else first
            names |= {"/".join(parts[:length]) for length in range(first, last + 1)}
        expand = self.query.get("expand") == "true"
        return Answer([self.entry(repo, revision, name, expand) for name in sorted(names)])

    def paths_info(self, repo_id: str, revision: str) -> Answer:
        repo, form = self.repo(repo_id), parse_qs(self.body.decode())
        expand = form.get("expand") == ["true"]
        entries = [self.entry(repo, revision, path.rstrip("/"), expand) for path in form.get("paths", [])]
        return Answer([entry for entry in entries if entry])

    def refs(self, repo_id: str) -> Answer:
        refs = self.repo(repo_id).refs
        answer: dict[str, list] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, commit_id in refs.items():
            _, kind, name = ref.split("/", 2)
            answer[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": commit_id})
        return Answer(answer)

    def commits(self, repo_id: str, revision: str) -> Answer:
        return Answer([commit_record(commit) for commit in self.repo(repo_id).log(revision)])

    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.repo(repo_id)
        user = self.user(required=False)
        if repo.gated and user != repo_id.split("/")[0]:
            raise HubError(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[path]
        if not blob.lfs:
            return self.part(blob.content, {**headers, "ETag": f'"{blob.etag}"'})
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return Answer(b"", 302, {**headers, "Location": self.link(repo_id, blob.etag)})

    def part(self, content: bytes, headers: dict[str, str]) -> Answer:
        """The bytes that the header `Range` asks for; all bytes without it."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return Answer(content, 200, headers)
        start, size = int(wanted[1]), len(content)
        if start >= size:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        stop = min(int(wanted[2] or size) + 1, size)
        return Answer(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    # Large files

    def link(self, repo_id: str, oid: str) -> str:
        return f"{self.server.storage}/{repo_id}/{oid}?signature={self.server.signature}"

    def lfs_batch(self, repo_id: str) -> Answer:
        """The addresses to send large files to; there is none for a file that is here already."""
        self.user()
        repo, objects = self.repo(repo_id), json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.objects:
                verify = f"{self.server.endpoint}/{repo_id}.git/info/lfs/objects/verify"
                item["actions"] = {"upload": {"href": self.link(repo_id, item["oid"])}, "verify": {"href": verify}}
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo_id: str) -> Answer:
        wanted = json.loads(self.body)
        if len(self.repo(repo_id).objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "The object was not uploaded")
        return Answer({})

    def stored(self, repo_id: str, oid: str) -> Answer:
        """The answer of the storage behind the Hub, which takes signed links and refuses tokens."""
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != self.server.signature:
            raise HubError(403, "The signature does not match")
        objects = self.server.repos[repo_id].objects
        if self.command != "PUT":
            return self.part(objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have this SHA-256")
        objects[oid] = self.body
        return Answer(b"")

    # Changes

    def preupload(self, repo_id: str, revision: str) -> Answer:
        """How to send each file, and the id of the file that is there under its name."""
        present = self.repo(repo_id, write=True).find(revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            is_binary = b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or is_binary or file["size"] > LFS_SIZE else "regular"
            oid = present[path].etag if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": answers})

    def commit(self, repo_id: str, revision: str) -> Answer:
        repo = self.repo(repo_id, write=True)
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        header = {"description": "", "parentCommit": "", **header["value"]}
        expected = header["parentCommit"]
        ref, parent = repo.ref(revision), repo.find(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        url, opened = f"{self.server.endpoint}/{repo_id}", {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref, parent = f"refs/pr/{number}", repo.find(expected or revision)
            opened = {"pullRequestUrl": f"{url}/discussions/{number}"}
        elif not parent.id.startswith(expected):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for change in changes:
            apply_change(files, change["key"], change["value"], repo.objects)
        about = {"title": header["summary"], "message": header["description"], "author": self.user()}
        made = repo.commit(ref, parent, files, **about)
        return Answer({"success": True, "commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}", **opened})

    def create_branch(self, repo_id: str, branch: str) -> Answer:
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        return self.create_ref(repo_id, f"refs/heads/{branch}", json.loads(self.body).get("startingPoint", "main"))

    def create_tag(self, repo_id: str, revision: str) -> Answer:
        return self.create_ref(repo_id, f"refs/tags/{json.loads(self.body)['tag']}", revision)

    def create_ref(self, repo_id: str, ref: str, revision: str) -> Answer:
        repo = self.repo(repo_id, write=True)
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.find(revision).id
        return Answer({})


def commit_record(commit: Commit) -> dict[str, Any]:
    named = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
    return {**named, "authors": [{"user": commit.author}]}


def apply_change(files: dict[str, Blob], kind: str, change: dict[str, Any], objects: dict[str, bytes]) -> None:
    """Make one change of a commit to `files`."""
    path = change["path"].rstrip("/")
    if kind == "file":
        files[path] = Blob(base64.b64decode(change["content"]), lfs=False)
    elif kind == "lfsFile":
        if change["oid"] not in objects:
            raise HubError(400, f"The LFS pointer {path} points to a file that does not exist")
        files[path] = Blob(objects[change["oid"]], lfs=True)
    else:
        gone = [name for name in files if name.startswith(f"{path}/")] if kind == "deletedFolder" else [path]
        if not gone or not set(gone) <= set(files):
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]


REPO, REVISION = r"(?P<repo_id>(?:spaces/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
MODEL = f"/api/(?P<kind>models|spaces)/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("DELETE", "/api/repos/delete", Handler.delete_repo),
    ("GET", f"{MODEL}(/revision/{REVISION})?", Handler.model_info),
    ("GET", f"{MODEL}/tree/{REVISION}(/(?P<path>.+))?", Handler.tree),
    ("POST", f"{MODEL}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"{MODEL}/refs", Handler.refs),
    ("GET", f"{MODEL}/commits/{REVISION}", Handler.commits),
    ("POST", f"{MODEL}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{MODEL}/commit/{REVISION}", Handler.commit),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("POST", f"{MODEL}/tag/{REVISION}", Handler.create_tag),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Handler.lfs_verify),
    ("GET HEAD PUT", f"/storage/{REPO}/(?P<oid>[0-9a-f]+)", Handler.stored),
]
