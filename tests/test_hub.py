"""Pushing to the Hub, against a server on this machine that answers as the Hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from lora import adapter_of, saved
from normswap.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


class FakeHub(ThreadingHTTPServer):
    """Attributes: the account it tells of, repositories by name, what was asked, and a path that fails, if any."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.account = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.fails = None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        self.asked.append(path)
        if self.fails and self.fails in path:
            return 403, {"error": "storage is full"}
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos.setdefault(name, {})
            self.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            return 200, {"url": f"{self.url}/{name}", "name": name}
        name = "/".join(path.split("/")[3:5])
        if not path.startswith("/api/models/") or name not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/tree/" in path:
            files = self.repos[name]
            return 200, [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in files.items()]
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.repos[name][line["value"]["path"]]
            return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}
        return 404, {"error": "Entry not found"}


class _Answers(BaseHTTPRequestHandler):
    def _answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        code, said = self.server.answer(self.path.partition("?")[0], body)
        text = json.dumps(said).encode()
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_HEAD = _answer  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("pushed")
    model = saved(root / "gpt2", "gpt2")
    return model, adapter_of(model, root / "mine", target_modules=["c_proj"])


def convert(model, out, *words):
    asked = ["convert", model, out, "--norm", "rmsnorm", "--verify", "none", *words]
    return CliRunner().invoke(main, [str(word) for word in asked])


def test_what_was_published_is_pushed_card_and_adapters_included(hub, source, tmp_path):
    model, adapter = source
    out = tmp_path / "out"
    done = convert(model, out, "--adapter", adapter, "--push-to-hub", "model", "--private")
    assert done.exit_code == 0, done.output
    assert done.stderr.endswith(f"published {out}\npushed to {hub.url}/me/model\n")
    local = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.repos["me/model"] == local and len(local) > 6 and hub.private == {"me/model"}
    card = local["README.md"].decode()
    assert 'folder = "me/model"' in card and "**not verified**" in card and "normswap" in card.split("---")[1]
    settings = json.loads(local["adapters/mine/adapter_config.json"])
    assert settings["base_model_name_or_path"] == "me/model"


@pytest.mark.parametrize(
    ("words", "change", "said"),
    [
        (["--push-to-hub", "a/b/c"], None, "a/b/c is no name of a repository: expected account/name"),
        (["--private"], None, "--private is of a repository"),
        (["--push-to-hub", "other/model"], None, "the token is me's, who is of team"),
        (
            ["--push-to-hub", "model"],
            ("account", {"name": "me", "auth": {"accessToken": {"role": "read"}}}),
            "only read",
        ),
        (
            ["--push-to-hub", "team/model"],
            ("repos", {"team/model": {"model.bin": b""}}),
            "holds 1 files already (model",
        ),
        (["--push-to-hub", "model"], ("fails", "whoami"), "cannot push to model: "),
    ],
)
def test_what_would_fail_at_the_end_is_refused_before_the_source_is_opened(hub, tmp_path, words, change, said):
    if change is not None:
        setattr(hub, *change)
    done = convert(tmp_path / "no such source", tmp_path / "out", *words)
    assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "out").exists() and not any("commit" in path or "create" in path for path in hub.asked)


def test_without_a_token_or_a_network(hub, tmp_path, monkeypatch):
    asked = tmp_path / "no such source", tmp_path / "out", "--push-to-hub", "model"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ConnectError" in (done := convert(*asked)).stderr and done.exit_code == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in (done := convert(*asked)).stderr and done.exit_code == 2
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token. Log in with `hf auth login`" in (done := convert(*asked)).stderr and done.exit_code == 2


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(hub, source, tmp_path):
    hub.fails = "/commit/"
    done = convert(source[0], tmp_path / "out", "--push-to-hub", "team/model")
    assert done.exit_code == 2 and "Traceback" not in done.output and "storage is full" in done.stderr
    assert f"Push it again with: hf upload team/model {tmp_path / 'out'} ." in done.stderr
    assert (tmp_path / "out/normswap.json").exists()


def test_what_is_replaced_leaves_nothing_of_what_was(hub, source, tmp_path):
    hub.repos["me/model"] = {".gitattributes": b"", "model-00001-of-00002.safetensors": b"", "README.md": b"old"}
    done = convert(source[0], tmp_path / "out", "--push-to-hub", "me/model", "--overwrite")
    assert done.exit_code == 0, done.output
    assert ".gitattributes" in hub.repos["me/model"] and "model.safetensors" in hub.repos["me/model"]
    assert "model-00001-of-00002.safetensors" not in hub.repos["me/model"]
    assert hub.repos["me/model"]["README.md"] == (tmp_path / "out/README.md").read_bytes()
