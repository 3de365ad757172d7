"""A local Hub that speaks the protocol of huggingface.co for models, static Spaces and Collections, and fails like real
networks.

It keeps everything in memory. Files are named as on the Hub: by git's checksum, or by SHA-256 if they are in LFS, which
`.gitattributes` of each repository decides.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from hub_state import (
    GIT_ATTRIBUTES,
    NEW_SPACE,
    RELATIONS,
    Blob,
    Refused,
    Repository,
    Request,
    belongs_in_lfs,
    metadata,
    oid_of,
    owner_of,
)
from local_server import LocalServer

Fault = Literal["cut", "hold"] | int
"""Close the connection in the middle of the request's body, keep it open and read no more, or answer with a status."""


class HubServer(LocalServer):
    """An empty Hub."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.storage_endpoint = f"http://localhost:{self.server_port}"  # another host, as on the Hub
        self.accounts: dict[str, dict[str, Any]] = {}
        """By token, what `whoami` answers."""
        self.repositories: dict[str, Repository] = {}
        """By address: OWNER/NAME is a model, spaces/OWNER/NAME a Space."""
        self.collections: dict[str, dict[str, Any]] = {}
        self.storage: dict[str, bytes] = {}
        """The objects of LFS by SHA-256."""
        self.requests: list[Request] = []
        self.faults: defaultdict[str, list[Fault | None]] = defaultdict(list)
        """By method and kind of address, such as "PUT storage", the faults of the next requests, in order."""
        self.holding = threading.Event()
        """Set when a request is held."""

    def add_account(self, token: str, name: str, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        self.accounts[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def add_repository(self, name: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        repository = self.repositories[name] = Repository(private)
        initial = {".gitattributes": Blob(GIT_ATTRIBUTES, False)}
        if name.startswith("spaces/"):
            initial |= {name: Blob(content, False) for name, content in NEW_SPACE.items()}
        repository.commit("initial commit", initial)
        if files:
            repository.commit("files", initial | {name: Blob(content, False) for name, content in files.items()})
        return repository

    def sent(self, method: str, path: str = "") -> list[Request]:
        """The requests of this method whose address contains a text."""
        return [request for request in self.requests if request.method == method and path in request.path]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(Request(self.command, path, self._token()))
        for kind, pattern, answer in _ROUTES:
            method = "GET" if self.command == "HEAD" else self.command
            if (found := re.fullmatch(pattern, path)) and kind.startswith(f"{method} "):
                faults = self.server.faults[kind]
                try:
                    body = self._read_body(faults.pop(0) if faults else None)
                    answer(self, *map(unquote, found.groups()), *([body] if method in ("POST", "PUT") else []))
                except Refused as refused:
                    self._refuse(refused)
                except _ConnectionCut:
                    self.close_connection = True
                return
        self._read_body(None)
        self._refuse(Refused(404, f"no such address: {self.command} {path}"))

    def _read_body(self, fault: Fault | None) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if fault in ("cut", "hold"):
            self.rfile.read(length // 2)
            if fault == "hold":
                self.server.holding.set()
                self.server.closing.wait()
            raise _ConnectionCut
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        if isinstance(fault, int):
            raise Refused(fault, "out of order")
        return body

    # Responses

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _refuse(self, refused: Refused) -> None:
        headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
        self._send_json({"error": refused.message} | refused.body, refused.status, **headers)

    # Rights

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def _account(self) -> dict[str, Any] | None:
        """The account of the request's token, if it has one.

        Raises:
            Refused: The token is wrong.
        """
        token = self._token()
        if token is not None and token not in self.server.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.accounts[token] if token else None

    def _names(self) -> set[str]:
        account = self._account()
        return {account["name"], *(org["name"] for org in account["orgs"])} if account else set()

    def _check_write(self, owner: str, kind: str = "model") -> None:
        account = self._account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        if owner not in self._names() or account["auth"]["accessToken"]["role"] == "read":
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')

    def _open(self, name: str, revision: str = "main", write: bool = False) -> tuple[Repository, str]:
        """A repository and a commit in it that the token may read, or write."""
        names = self._names()
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and owner_of(name) not in names):
            if self._token() is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(owner_of(name))
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    # The API

    def whoami(self) -> None:
        account = self._account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        self._send_json(account)

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked["organization"] or (self._account() or {"name": ""})["name"]
        self._check_write(owner)
        if asked["type"] == "space" and asked["sdk"] != "static":
            raise Refused(400, f"Unknown SDK: {asked['sdk']}")
        name = f"{'spaces/' if asked['type'] == 'space' else ''}{owner}/{asked['name']}"
        url = f"{self.server.origin}/{name}"
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=url)
        self.server.add_repository(name, asked.get("visibility") == "private" or asked.get("private", False))
        self._send_json({"url": url, "name": name})

    def repository_info(self, name: str, revision: str = "main") -> None:
        repository, commit = self._open(name, revision)
        files = repository.commits[commit]
        card = metadata(files["README.md"].content) if "README.md" in files else {}
        self._send_json(
            {
                "_id": "0" * 24,
                "id": name.removeprefix("spaces/"),
                "private": repository.private,
                "sha": commit,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "evalResults": [
                    {"filename": path, "data": entry}
                    for path, blob in files.items()
                    if fnmatch.fnmatch(path, ".eval_results/*.yaml")
                    for entry in yaml.safe_load(blob.content)
                ],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository, commit = self._open(name, revision)
        files = repository.commits[commit]
        if folder:
            files = {path: blob for path, blob in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {path.rpartition("/")[0] for path in files if "/" in path}
        items: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders]
        for path, blob in files.items():
            lfs = {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.in_lfs else {}
            items.append({"type": "file", "oid": blob.git_id, "size": len(blob.content), "path": path} | lfs)
        start, size = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0]), 10  # the Hub's pages have 1,000
        base = f"{self.server.origin}{urlsplit(self.path).path}"
        more = (
            {"Link": f'<{base}?recursive=True&cursor={start + size}>; rel="next"'} if len(items) > start + size else {}
        )
        self._send_json(items[start : start + size], **more)

    def commits(self, name: str, revision: str) -> None:
        """The messages of the commits up to a revision, the newest first."""
        repository, commit = self._open(name, revision)
        names = list(repository.commits)
        commits = [
            {"id": commit, "title": message, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for commit, message in zip(names, repository.messages, strict=True)
        ]
        self._send_json(commits[names.index(commit) :: -1])

    def refs(self, name: str) -> None:
        repository, commit = self._open(name)
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": target} for tag, target in repository.tags.items()
        ]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit}]
        self._send_json({"branches": branches, "tags": tags, "converts": []})

    def tag(self, name: str, revision: str, body: bytes) -> None:
        repository, commit = self._open(name, revision, write=True)
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, f"Tag reference exists already: refs/tags/{tag}")
        repository.tags[tag] = commit
        self._send_json({})

    def validate_yaml(self, body: bytes) -> None:
        relation = metadata(json.loads(body)["content"].encode()).get("base_model_relation")
        if relation is not None and relation not in RELATIONS:
            message = f'"base_model_relation" must be one of {sorted(RELATIONS)}'
            raise Refused(400, message, errors=[{"message": message}], warnings=[])
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        repository, commit = self._open(name, revision, write=True)
        files, asked = repository.commits[commit], json.loads(body)
        self._send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if belongs_in_lfs(files, file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": oid_of(files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in asked["files"]
                ]
            }
        )

    def lfs_batch(self, name: str, body: bytes) -> None:
        self._open(name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.storage:
                upload = f"{self.server.storage_endpoint}/storage/{asked['oid']}?signature=secret-of-the-upload"
                verify = f"{self.server.origin}/{name}/lfs-verify"
                found["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(found)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, name: str, body: bytes) -> None:
        self._open(name, write=True)
        asked = json.loads(body)
        if len(self.server.storage.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "object not found")
        self._send_json({})

    def put_object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "checksum mismatch")
        self.server.storage[oid] = body
        self._send(b"")

    def get_object(self, oid: str) -> None:
        self._send(self.server.storage[oid])

    def commit(self, name: str, revision: str, body: bytes) -> None:
        repository, parent = self._open(name, revision, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repository.commits[parent])
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                if belongs_in_lfs(files, path, len(content)):
                    raise Refused(400, f"{path} must be in LFS")
                files[path] = Blob(content, False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.storage:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = Blob(self.server.storage[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
            else:
                raise Refused(400, f"unknown operation {line['key']}")
        made = repository.commit(header["summary"], files)
        self._send_json({"success": True, "commitOid": made, "commitUrl": f"{self.server.origin}/{name}/commit/{made}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._open(name, revision)
        blob = repository.commits[commit].get(path)
        headers = {"X_Repo_Commit": commit}
        if blob is None:
            self._send_json({}, 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **headers)
        elif blob.in_lfs:
            headers |= {"X_Linked_ETag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.content))}
            self._send(b"", 302, Location=f"{self.server.storage_endpoint}/storage/{blob.sha256}", **headers)
        else:
            self._send(blob.content, ETag=f'"{blob.git_id}"', **headers)

    def create_collection(self, body: bytes) -> None:
        asked = json.loads(body)
        self._check_write(asked["namespace"], "collection")
        for slug, found in self.server.collections.items():
            if found["title"] == asked["title"] and found["owner"] == asked["namespace"]:
                raise Refused(409, "A collection with this title exists already", slug=slug)
        slug = f"{asked['namespace']}/{quote(asked['title'].lower())}-{len(self.server.collections):024x}"
        self.server.collections[slug] = {
            "slug": slug,
            "title": asked["title"],
            "owner": asked["namespace"],
            "private": asked["private"],
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "theme": "green",
            "upvotes": 0,
        }
        self._send_json(self.server.collections[slug])

    def get_collection(self, slug: str) -> None:
        self._account()
        self._send_json(self.server.collections[slug])

    def add_collection_item(self, slug: str, body: bytes) -> None:
        collection, item = self.server.collections[slug], json.loads(body)["item"]
        self._check_write(collection["owner"], "collection")
        self._open(f"{'spaces/' if item['type'] == 'space' else ''}{item['id']}")
        if any(found["id"] == item["id"] for found in collection["items"]):
            raise Refused(409, "This item is in the collection already")
        place = len(collection["items"])
        collection["items"].append({"_id": f"{place:024x}", "position": place, **item})
        self._send_json(collection)


class _ConnectionCut(Exception):
    """The server reads no more of a request and answers nothing."""


_REPO = "((?:spaces/)?[^/]+/[^/]+)"
_API = "/api/(?:models/|(?=spaces/))"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET whoami", "/api/whoami-v2", _Handler.whoami),
    ("POST create", "/api/repos/create", _Handler.create_repo),
    ("POST validate", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST collection", "/api/collections", _Handler.create_collection),
    ("GET collection", f"/api/collections/{_REPO}", _Handler.get_collection),
    ("POST item", f"/api/collections/{_REPO}/items", _Handler.add_collection_item),
    ("GET repository", f"{_API}{_REPO}", _Handler.repository_info),
    ("GET repository", f"{_API}{_REPO}/revision/([^/]+)", _Handler.repository_info),
    ("GET tree", f"{_API}{_REPO}/tree/([^/]+)", _Handler.tree),
    ("GET tree", f"{_API}{_REPO}/tree/([^/]+)/(.+)", _Handler.tree),
    ("GET commits", f"{_API}{_REPO}/commits/([^/]+)", _Handler.commits),
    ("GET refs", f"{_API}{_REPO}/refs", _Handler.refs),
    ("POST tag", f"{_API}{_REPO}/tag/([^/]+)", _Handler.tag),
    ("POST preupload", f"{_API}{_REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST commit", f"{_API}{_REPO}/commit/([^/]+)", _Handler.commit),
    ("POST batch", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST verify", f"/{_REPO}/lfs-verify", _Handler.lfs_verify),
    ("PUT storage", "/storage/([0-9a-f]+)", _Handler.put_object),
    ("GET storage", "/storage/([0-9a-f]+)", _Handler.get_object),
    ("GET file", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
