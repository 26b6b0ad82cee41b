"""A Hub to test against: repositories, commits, LFS, branches, pull requests and permissions, over HTTP, in memory.

It answers what huggingface_hub, transformers, timm and datasets ask. Large files live on a second port, as the real
ones live on another host: clients must follow a redirect there, and must not send their token along. `hub.inject`
makes requests fail in the ways that networks do.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.hub.hub_store import Blob, Refusal, Repository

LFS_ENDINGS = (".safetensors", ".png", ".parquet", ".arrow", ".bin", ".npz")
PLURAL = {"model": "models", "dataset": "datasets", "space": "spaces"}
CORRUPT = web.RequestKey("corrupt", bool)
DATE = "2026-11-21T00:00:00.000Z"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fault:
    """What befalls the next `times` requests that match: a status, "drop", "drop after", "corrupt" or "stall"."""

    method: str
    path: str
    what: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The server, in a thread: `with HubServer() as hub`.

    Args:
        accounts: For each token the user, and the namespaces that it may write to; the first is the user's own.
    """

    def __init__(self, accounts: dict[str, list[str]]) -> None:
        self.accounts = accounts
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.leaks: list[str] = []  # requests that carried a token to the host of the large files

    def inject(self, method: str, path: str, what: int | str, times: int = 1, **headers: str) -> None:
        self.faults.append(Fault(method, path, what, times, {k.replace("_", "-"): v for k, v in headers.items()}))

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def put(self, name: str, files: dict[str, bytes], kind: str = "model") -> Repository:
        """Stores a repository without asking anybody."""
        repository = self.repositories[kind, name] = Repository(kind, name, False)
        blobs = {path: Blob(content, path.endswith(LFS_ENDINGS)) for path, content in files.items()}
        repository.refs["main"] = repository.add(blobs, "put", "", repository.refs["main"])
        return repository

    def count(self, method: str, path: str) -> int:
        return sum(entry[0] == method and re.search(path, entry[1]) is not None for entry in self.log)

    # -- who may do what ----------------------------------------------------------------------------------------------

    def _namespaces(self, request: web.Request) -> list[str]:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return []
        if token not in self.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def _may_write(self, request: web.Request, name: str) -> None:
        namespaces = self._namespaces(request)
        if not namespaces:
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] not in namespaces[1:]:
            raise Refusal(403, f"You don't have the rights to write to {name}")

    def _find(self, request: web.Request, *, write: bool = False) -> Repository:
        kind = request.match_info.get("kinds", "models").removesuffix("s")
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        namespaces = self._namespaces(request)
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and name.split("/")[0] not in namespaces):
            raise Refusal(404 if namespaces else 401, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(request, name)
        return repository

    def _address(self, repository: Repository) -> str:
        return f"{self.endpoint}/{'' if repository.kind == 'model' else repository.kind + 's/'}{repository.id}"

    # -- accounts, repositories, references ---------------------------------------------------------------------------

    async def whoami(self, request: web.Request) -> web.Response:
        namespaces = self._namespaces(request)
        if not namespaces:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name, "fullname": name} for name in namespaces[1:]]
        return web.json_response({"type": "user", "name": namespaces[0], "orgs": orgs, "auth": {}})

    async def create(self, request: web.Request) -> web.Response:
        body = await request.json()
        namespaces = self._namespaces(request)
        name = f"{body.get('organization') or (namespaces or [''])[0]}/{body['name']}"
        self._may_write(request, name)
        key = body.get("type") or "model", name
        status = 409 if key in self.repositories else 200
        self.repositories.setdefault(key, Repository(*key, body.get("visibility") == "private"))
        return web.json_response({"url": self._address(self.repositories[key]), "name": name}, status=status)

    async def validate_yaml(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def info(self, request: web.Request) -> web.Response:
        repository = self._find(request)
        commit = repository.at(request.match_info.get("revision", "main"))
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        plain = {"id": repository.id, "sha": commit.sha, "private": repository.private, "siblings": siblings}
        if "config.json" in commit.files:
            plain["config"] = json.loads(commit.files["config.json"].content)
        return web.json_response({**plain, "modelId": repository.id, "tags": [], "downloads": 0, "gated": False})

    async def list_refs(self, request: web.Request) -> web.Response:
        refs = self._find(request).refs
        pulls = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in refs.items() if n.startswith("refs/pr/")]
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha}
            for n, sha in refs.items()
            if not n.startswith("refs/pr/")
        ]
        return web.json_response({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})

    async def list_commits(self, request: web.Request) -> web.Response:
        history = self._find(request).history(request.match_info["revision"])
        return web.json_response(
            [
                {"id": c.sha, "title": c.title, "message": c.description, "date": DATE, "authors": [{"user": "x"}]}
                for c in history
            ]
        )

    async def create_branch(self, request: web.Request) -> web.Response:
        repository, name = self._find(request, write=True), request.match_info["revision"]
        if name in repository.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        start = (await request.json()).get("startingPoint") or "main"
        repository.refs[name] = repository.at(start).sha
        return web.Response()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
        return entry | ({"lfs": {"oid": blob.sha256, "size": entry["size"], "pointerSize": 134}} if blob.lfs else {})

    async def tree(self, request: web.Request) -> web.Response:
        commit = self._find(request).at(request.match_info["revision"])
        base = request.match_info.get("path", "").strip("/")
        inside = {p: b for p, b in commit.files.items() if not base or p.startswith(f"{base}/")}
        if base and not inside:
            raise Refusal(404, f"{base} does not exist", "EntryNotFound")
        deep = request.query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(inside.items()):
            parts = path[len(base) + bool(base) :].split("/")
            for depth in range(1, len(parts) if deep else min(len(parts), 2)):
                folder = "/".join([*([base] if base else []), *parts[:depth]])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if deep or len(parts) == 1:
                entries[path] = self._entry(path, blob)
        return web.json_response(list(entries.values()))

    async def paths_info(self, request: web.Request) -> web.Response:
        files = self._find(request).at(request.match_info["revision"]).files
        asked = (await request.post()).getall("paths", [])
        return web.json_response([self._entry(str(path), files[str(path)]) for path in asked if path in files])

    async def resolve(self, request: web.Request) -> web.Response:
        commit = self._find(request).at(request.match_info["revision"])
        headers, blob = {"X-Repo-Commit": commit.sha}, commit.files.get(request.match_info["path"])
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return web.json_response({"error": "Entry not found"}, status=404, headers=headers)
        if not blob.lfs:
            return _content(request, blob.content, {**headers, "ETag": f'"{blob.etag}"'})
        self.large[blob.sha256] = blob.content
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return web.Response(status=302, headers={**headers, "Location": f"{self.storage}/large/{blob.sha256}"})

    async def read_large(self, request: web.Request) -> web.Response:
        content = self.large[request.match_info["oid"]]
        return _content(request, _flipped(content) if request.get(CORRUPT) else content, {})

    # -- writing ------------------------------------------------------------------------------------------------------

    async def preupload(self, request: web.Request) -> web.Response:
        files = self._find(request, write=True).at(request.match_info["revision"]).files
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].etag if file["path"] in files else None,
            }
            for file in (await request.json())["files"]
        ]
        return web.json_response({"files": answer})

    async def lfs_batch(self, request: web.Request) -> web.Response:
        self._find(request, write=True)
        objects = (await request.json())["objects"]
        for one in objects:
            if one["oid"] not in self.large:
                upload = {"href": f"{self.storage}/large/{one['oid']}"}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs/verify"}}
        return web.json_response({"transfer": "basic", "objects": objects})

    async def write_large(self, request: web.Request) -> web.Response:
        content, oid = await request.read(), request.match_info["oid"]
        content = _flipped(content) if request.get(CORRUPT) else content
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the SHA-256 that was announced")
        self.large[oid] = content
        return web.Response()

    async def verify(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.Response(status=200 if len(self.large.get(body["oid"], b"")) == body["size"] else 422)

    async def commit(self, request: web.Request) -> web.Response:
        repository, revision = self._find(request, write=True), request.match_info["revision"]
        parent, header = repository.at(revision), {}
        files = dict(parent.files)
        for line in (await request.read()).splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                header = value
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refusal(400, f"{value['path']}: was never uploaded")
                files[value["path"]] = Blob(self.large[value["oid"]], True)
            else:
                del files[value["path"]]
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refusal(412, "A commit has happened since")
        sha = repository.add(files, header["summary"], header.get("description", ""), parent.sha)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self._address(repository)}/commit/{sha}"}
        if request.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            revision, answer["pullRequestUrl"] = (
                f"refs/pr/{number}",
                f"{self._address(repository)}/discussions/{number}",
            )
        repository.refs[revision] = sha
        return web.json_response(answer)

    # -- the machinery ------------------------------------------------------------------------------------------------

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.url.port == self._storage_port and "Authorization" in request.headers:
            self.leaks.append(request.path)
        fault = next(
            (f for f in self.faults if f.times and f.method == request.method and re.search(f.path, request.path)),
            None,
        )
        if fault is not None:
            fault.times -= 1
            if isinstance(fault.what, int):
                return self._note(request, web.Response(status=fault.what, headers=fault.headers))
            if fault.what == "corrupt":
                request[CORRUPT] = True
            elif fault.what == "stall":
                self.log.append((request.method, request.raw_path, -1))
                await asyncio.sleep(600)
            elif fault.what == "drop":
                return self._drop(request)
        try:
            response = await handler(request)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            response = web.json_response({"error": refusal.message}, status=refusal.status, headers=headers)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
        return (
            self._drop(request) if fault is not None and fault.what == "drop after" else self._note(request, response)
        )

    def _note(self, request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        self.log.append((request.method, request.raw_path, response.status))
        return response

    def _drop(self, request: web.Request) -> web.Response:
        self.log.append((request.method, request.raw_path, 0))
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._around], client_max_size=2**30)
        router, api = application.router, "/api/{kinds:models|datasets|spaces}/{owner}/{name}"
        router.add_get("/api/whoami-v2", self.whoami)
        router.add_post("/api/repos/create", self.create)
        router.add_post("/api/validate-yaml", self.validate_yaml)
        router.add_post("/lfs/verify", self.verify)
        router.add_get("/large/{oid}", self.read_large)
        router.add_put("/large/{oid}", self.write_large)
        for path in ("", "/revision/{revision}"):
            router.add_get(api + path, self.info)
        for path in ("", "/{path:.*}"):
            router.add_get(api + "/tree/{revision}" + path, self.tree)
        router.add_get(api + "/refs", self.list_refs)
        router.add_get(api + "/commits/{revision}", self.list_commits)
        router.add_post(api + "/branch/{revision}", self.create_branch)
        router.add_post(api + "/paths-info/{revision}", self.paths_info)
        router.add_post(api + "/preupload/{revision}", self.preupload)
        router.add_post(api + "/commit/{revision}", self.commit)
        for kinds in ("/{kinds:datasets|spaces}", ""):
            router.add_post(kinds + "/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch)
            router.add_get(kinds + "/{owner}/{name}/resolve/{revision}/{path:.*}", self.resolve)
        return application

    async def _start(self) -> list[int]:
        self._runner = web.AppRunner(self._application(), handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        for _ in range(2):
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return [address[1] for address in self._runner.addresses]

    def __enter__(self) -> HubServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        port, self._storage_port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{self._storage_port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _content(request: web.Request, content: bytes, headers: dict[str, str]) -> web.Response:
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return web.Response(body=content, headers=headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return web.Response(status=206, body=content[first : last + 1], headers=headers)
