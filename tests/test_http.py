"""Rewards over HTTP: both ends on this machine, and servers that are slow, broken or wrong."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rewards
from rewards import BadInput, RewardError
from scorers import remote

HERE = Path(__file__).resolve().parent.parent
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 6, 3), np.uint8)) for i in range(3)]
ASKED = IMAGES, ("a", "b", "c"), ({"n": 1}, {}, {})


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Short waits, and a proxy that is not there: this machine is asked without it."""
    monkeypatch.setattr(remote, "POST_TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "WAIT", 0.001)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def start():
    """Start a server on a thread; its URL."""
    servers = []

    def start(server):
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def serve(start):
    return lambda name, reward: start(remote.make_server(name, reward, "127.0.0.1", 0))


@pytest.fixture
def fake(start):
    """fake(*answers): a server that gives the i-th request the i-th (status, JSON), then always the last.

    In place of JSON a function of the handler may answer. Returns the URL and a list: what was asked.
    """

    def fake(*answers):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked.append((self.path, json.loads(body or "null")))
                status, content = answers[min(len(asked), len(answers)) - 1]
                if callable(content):
                    content(self)
                    return
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            do_GET = do_POST

            def log_message(self, *args):
                pass

        return start(ThreadingHTTPServer(("127.0.0.1", 0), Handler)), asked

    return fake


@pytest.fixture
def http(fake, monkeypatch):
    """http(*answers): the reward `http` of a server that gives these answers, and what it was asked."""

    def http(*answers):
        url, asked = fake((200, {"reward": "x"}), *answers)
        monkeypatch.setenv("GRPO_GUARD_HTTP_URL", url)
        return rewards.load("http"), asked

    return http


def means(images, prompts, metadata):
    assert prompts == ["a", "b", "c"] and metadata == [{"n": 1}, {}, {}]
    return [np.asarray(image).mean() for image in images]


@pytest.mark.parametrize(
    "name, variable",
    [
        ("http", "GRPO_GUARD_HTTP_URL"),
        ("geneval-strict", "GRPO_GUARD_GENEVAL_STRICT_URL"),
        ("my.module:load", "GRPO_GUARD_MY_MODULE_LOAD_URL"),
    ],
)
def test_a_served_reward_is_the_reward_itself(serve, monkeypatch, name, variable):
    monkeypatch.setattr(rewards, "find_loader", pytest.fail)  # it must not be built here
    monkeypatch.setenv(variable, serve(name, means) + "/")
    assert rewards.load(name)(*ASKED) == means(IMAGES, ["a", "b", "c"], [{"n": 1}, {}, {}])


@pytest.mark.parametrize(
    "url, message",
    [
        (None, "expected a URL like"),
        ("127.0.0.1:8000", "expected a URL like"),
        ("ftp://a/b", "expected a URL like"),
        ("http://u:secret@a:1", "expected a URL like"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9: .*no answer, .*refused"),
    ],
)
def test_a_server_that_cannot_be_asked_is_noticed_at_the_start(monkeypatch, url, message):
    if url:
        monkeypatch.setenv("GRPO_GUARD_HTTP_URL", url)
    with pytest.raises(BadInput, match=message) as error:
        rewards.load("http")
    assert "secret" not in str(error.value)


def test_another_reward_than_asked_for_is_noticed_at_the_start(serve, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_IMAGEREWARD_URL", serve("ocr", means))
    with pytest.raises(BadInput, match="127.0.0.1.*serves 'ocr'; expected 'imagereward'"):
        rewards.load("imagereward")


def test_a_reward_that_fails_on_the_server_fails_here(serve, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_HTTP_URL", serve("x", lambda *asked: 1 / 0))
    with pytest.raises(RewardError, match="127.0.0.1.*500, .*ZeroDivisionError"):
        rewards.load("http")(*ASKED)


GOOD = 200, {"scores": [1, 2, 3]}


@pytest.mark.parametrize("first", [(503, "busy"), (0, lambda handler: handler.connection.shutdown(2))])
def test_5xx_and_broken_connections_are_tried_again(http, first):
    reward, asked = http(first, first, GOOD)
    assert reward(*ASKED) == [1, 2, 3] and len(asked) == 4


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"])
def test_a_request_that_was_sent_is_not_sent_again_after_a_timeout(http, begun):
    """The server may still be scoring it."""
    done = threading.Event()
    reward, asked = http((0, lambda handler: (handler.wfile.write(begun), done.wait(10))), GOOD)
    with pytest.raises(RewardError, match="http://127.0.0.1:.*no answer, timed out"):
        reward(*ASKED)
    done.set()
    assert len(asked) == 2  # the one at the start, and one


@pytest.mark.parametrize("status", [401, 404, 302, 307, 504])
def test_other_answers_are_final_and_no_redirect_is_followed(http, status):
    reward, asked = http((status, "no"), GOOD)
    with pytest.raises(RewardError, match=f"http://127.0.0.1:.*got {status},"):
        reward(*ASKED)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "answer, message",
    [
        ([1, 2, 3], "got 200, .1, 2, 3"),
        ({"score": [1, 2, 3]}, "'scores'"),
        ({"scores": 5}, "expected 3 numbers, got 5"),
        ({"scores": [1, 2, None]}, "expected 3 numbers"),
        ({"scores": [1, 2]}, "expected 3 finite numbers"),
        ({"scores": [1, 2, float("nan")]}, "expected 3 finite numbers, .*nan"),
    ],
)
def test_a_wrong_answer_is_not_a_score(http, answer, message):
    reward, _ = http((200, answer))
    with pytest.raises(RewardError, match=message):
        reward(*ASKED)


@pytest.mark.parametrize(
    "status, text, score, message",
    [
        (200, "It fits.\nFinal Score: 3.5", 0.7, None),
        (200, "**Final Score:** 1 ... **Final Score:** 3.5/5", 0.7, None),
        (200, "good", None, "expected .Final Score:."),
        (200, "Final Score: 7", None, "expected .Final Score:."),
        (200, None, None, "expected .Final Score:."),
        (401, "bad key sk-secret", None, "got 401, .*bad key [*]{3}"),
    ],
)
def test_unifiedreward_is_the_last_mark_of_each_picture_by_5(fake, monkeypatch, status, text, score, message):
    """No mark is no score, and the key is never shown."""
    completion = status, {"choices": [{"message": {"content": text}}]}
    url, asked = fake((200, {"data": [{"id": "unified-7b"}]}), completion)
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_API", f"{url}/v1")
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_KEY", "sk-secret")
    reward = rewards.load("unifiedreward")
    if message:
        with pytest.raises(RewardError, match=message) as error:
            reward(*ASKED)
        assert "sk-secret" not in str(error.value)
        return
    assert reward(*ASKED) == [score] * 3
    assert [path for path, _ in asked] == ["/v1/models"] + ["/v1/chat/completions"] * 3
    shown = {}
    for _, data in asked[1:]:
        picture, question = data["messages"][0]["content"]
        shown[question["text"][-1]] = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert shown == {prompt: remote.png(image) for prompt, image in zip("abc", IMAGES, strict=True)}


SERVED = "def load():\n    return lambda images, prompts, metadata: [image.width / 10 for image in images]\n"


def test_the_command_serves_a_reward_by_module_and_function(tmp_path, monkeypatch):
    """It must not read itself, though the variable is set for it too."""
    (tmp_path / "served.py").write_text(SERVED)
    variable = "GRPO_GUARD_SERVED_LOAD_URL"
    environment = os.environ | {variable: "http://127.0.0.1:9", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "scorers.remote", "serve", "served:load", "--port", "0"]
    with subprocess.Popen(command, cwd=HERE, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            name, _, url = server.stdout.readline().split()
            monkeypatch.setenv(variable, url)
            assert name == "served:load" and rewards.load("served:load")(*ASKED) == [0.6] * 3
        finally:
            server.kill()
