"""Rewards over HTTP: both ends on loopback, and servers that are slow, broken or wrong."""

import base64
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rewards
from rewards import BadInput, RewardError
from scorers import remote

HERE = Path(__file__).resolve().parent.parent
IMAGES = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in (0, 51, 255)]
ASKED = IMAGES, ("a", "b", "c"), ({"n": 1}, {}, {})


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Short waits, a proxy that is not there, and none of the user's own servers."""
    monkeypatch.setattr(remote, "GET_TIMEOUT", 2)
    monkeypatch.setattr(remote, "POST_TIMEOUT", 2)
    monkeypatch.setattr(remote, "WAIT", 0.001)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.startswith("GRPO_GUARD_")]:
        monkeypatch.delenv(name)


def running(server):
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def serve():
    """Start a reward's server; its URL."""
    servers = []

    def start(name, reward):
        servers.append(remote.make_server(name, reward, "127.0.0.1", 0))
        return running(servers[-1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fake():
    """Start a server that answers the i-th request by the i-th (status, body), the last one for good.

    Its URL, and the list of (path, headers, JSON) of what was asked.
    """
    servers = []

    def start(*answers):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked.append((self.path, self.headers, json.loads(body or "null")))
                status, text = answers[min(len(asked), len(answers)) - 1]
                if callable(text):
                    text(self)
                    return
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(text if isinstance(text, bytes) else json.dumps(text).encode())

            do_GET = do_POST

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        return running(servers[-1]), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def brightness(images, prompts, metadata):
    assert prompts == ["a", "b", "c"] and metadata == [{"n": 1}, {}, {}]
    return [np.asarray(image).mean() / 255 for image in images]


def test_a_served_reward_is_the_reward_itself(serve, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "ocr", pytest.fail)  # it must not be built here
    url = serve("ocr", brightness)
    for variable, name in (("GRPO_GUARD_HTTP_URL", "http"), ("GRPO_GUARD_OCR_URL", "ocr")):
        monkeypatch.setenv(variable, url + "/")
        assert rewards.load(name)(*ASKED) == pytest.approx([0, 0.2, 1])


def test_pictures_arrive_pixel_by_pixel(serve, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    got = []
    monkeypatch.setenv("GRPO_GUARD_HTTP_URL", serve("x", lambda images, *_: got.extend(images) or [1.0]))
    rewards.load("http")([noise], ["a"], [{}])
    assert got[0].mode == "RGB" and (np.asarray(got[0]) == np.asarray(noise)).all()


def test_names_with_a_hyphen_have_a_variable(serve, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_GENEVAL_STRICT_URL", serve("geneval-strict", brightness))
    assert rewards.load("geneval-strict")(*ASKED)[2] == 1


def test_the_wrong_server_is_noticed_at_the_start(serve, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_IMAGEREWARD_URL", serve("ocr", brightness))
    with pytest.raises(BadInput, match="127.0.0.1.*serves 'ocr'; expected 'imagereward'"):
        rewards.load("imagereward")


def test_a_failing_reward_fails_at_the_other_end(serve, monkeypatch):
    calls = []

    def broken(images, prompts, metadata):
        calls.append(1)
        raise RuntimeError("engine broke")

    monkeypatch.setenv("GRPO_GUARD_HTTP_URL", serve("x", broken))
    with pytest.raises(RewardError, match="127.0.0.1.*500, .*RuntimeError: engine broke"):
        rewards.load("http")(*ASKED)
    assert len(calls) == remote.TRIES


@pytest.mark.parametrize(
    "request_body, why",
    [
        (b"not json", "JSONDecodeError"),
        (b"{}", "KeyError: 'images'"),
        (b'{"images": ["?"], "prompts": ["a"], "metadata": [{}]}', "Error"),
        (b'{"images": ["aGVsbG8="], "prompts": ["a"], "metadata": [{}]}', "cannot identify image"),
        (b'{"images": [], "prompts": ["a"], "metadata": []}', "as many prompts"),
    ],
)
def test_a_malformed_request_is_the_senders_fault(serve, request_body, why):
    url = serve("x", brightness)
    with remote.opener(url).open(urllib.request.Request(url, request_body), timeout=5) as answer:
        assert answer.status == 400 and why in json.load(answer)["error"]


def test_only_png_is_opened(serve):
    Image.new("RGB", (4, 4)).save(buffer := io.BytesIO(), "GIF")
    body = dict(images=[base64.b64encode(buffer.getvalue()).decode()], prompts=["a"], metadata=[{}])
    with pytest.raises(RewardError, match="400, .*cannot identify image"):
        remote.ask(serve("x", brightness), data=body)


def body_of(images):
    return dict(images=images, prompts=["a"] * len(images), metadata=[{}] * len(images))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("shape", [(13_000, 13_000), (8192, 8193), (20_000, 20_000)])
def test_a_small_file_of_a_huge_picture_is_not_decoded(serve, monkeypatch, shape):
    """Black pictures compress a thousandfold: 13,000 x 13,000 pixels are 219 KB as PNG, 507 MB as RGB."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    header = struct.pack(">4sIIBBBBB", b"IHDR", *shape, 1, 0, 0, 0, 0)  # the size is all that may be read
    picture = bytearray(buffer.getvalue())
    picture[12:33] = header + struct.pack(">I", zlib.crc32(header))
    monkeypatch.setattr(Image.Image, "convert", pytest.fail)
    with pytest.raises(RewardError, match="400, .*pixels"):
        remote.ask(serve("x", brightness), data=body_of([base64.b64encode(picture).decode()]))


def test_many_pictures_may_not_be_large_together(serve):
    good = [remote.png(Image.new("L", (4096, 4096)))] * 4  # exactly as many as may be
    url = serve("x", lambda images, prompts, metadata: [image.width for image in images])
    assert remote.ask(url, "scores", data=body_of(good)) == [4096] * 4
    with pytest.raises(RewardError, match="400, .*more than 67108864 pixels together"):
        remote.ask(url, data=body_of([*good, remote.png(Image.new("L", (1, 1)))]))


def test_a_request_holds_at_most_256_pictures(serve):
    url = serve("x", lambda images, prompts, metadata: [0.5] * len(images))
    picture = remote.png(Image.new("L", (1, 1)))
    assert remote.ask(url, "scores", data=body_of([picture] * 256)) == [0.5] * 256
    with pytest.raises(RewardError, match="400, .*257 images; expected at most 256"):
        remote.ask(url, data=body_of([picture] * 257))


@pytest.mark.parametrize("length", ["Content-Length: 99999999999\r\n", "Content-Length: -1\r\n", ""])
def test_the_size_of_a_request_is_limited(serve, length):
    port = int(serve("x", brightness).rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"POST / HTTP/1.1\r\n{length}\r\n".encode())
        assert b" 400 " in connection.makefile("rb").readline()


def test_a_client_that_stalls_does_not_stop_the_others(serve, monkeypatch):
    url = serve("x", brightness)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as stalled:
        stalled.sendall(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf")
        monkeypatch.setenv("GRPO_GUARD_HTTP_URL", url)
        assert rewards.load("http")(*ASKED)[2] == 1


HELLO = (200, {"reward": "x"})


def http(fake, monkeypatch, *answers):
    url, asked = fake(HELLO, *answers)
    monkeypatch.setenv("GRPO_GUARD_HTTP_URL", url)
    return rewards.load("http"), asked


def test_5xx_and_broken_connections_are_tried_again(fake, monkeypatch):
    def hang_up(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    def babble(handler):
        handler.wfile.write(b"what?\r\n\r\n")

    good = (200, {"scores": [1, 2, 3]})
    for first in ((503, "busy"), (0, hang_up), (0, babble)):
        reward, asked = http(fake, monkeypatch, first, first, good)
        assert reward(*ASKED) == [1, 2, 3] and len(asked) == 4


def test_a_request_that_was_sent_is_not_sent_again_after_a_timeout(fake, monkeypatch):
    """The server may still be scoring it."""
    done = threading.Event()
    reward, asked = http(fake, monkeypatch, (0, lambda handler: done.wait(10)))
    monkeypatch.setattr(remote, "POST_TIMEOUT", 0.2)
    with pytest.raises(RewardError, match="http://127.0.0.1:.*no answer, timed out"):
        reward(*ASKED)
    done.set()
    assert len(asked) == 2  # the one at the start, and one


def test_an_answer_that_stops_halfway_is_a_timeout_too(fake, monkeypatch):
    done = threading.Event()

    def half(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        done.wait(10)

    reward, asked = http(fake, monkeypatch, (0, half))
    monkeypatch.setattr(remote, "POST_TIMEOUT", 0.2)
    with pytest.raises(RewardError, match="no answer, timed out"):
        reward(*ASKED)
    done.set()
    assert len(asked) == 2


def test_scoring_may_take_longer_than_a_greeting(fake, monkeypatch):
    def late(handler):
        time.sleep(0.3)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"scores": [1, 2, 3]}')

    reward, asked = http(fake, monkeypatch, (0, late))
    monkeypatch.setattr(remote, "GET_TIMEOUT", 0.05)
    assert reward(*ASKED) == [1, 2, 3] and len(asked) == 2


def test_a_connection_that_takes_too_long_is_tried_again(monkeypatch):
    """A timeout before anything was sent, as of a machine that is just starting."""
    tried = []

    def connect(address, *args, **kwargs):
        tried.append(address)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RewardError, match="no answer, URLError: .*timed out"):
        remote.ask("http://127.0.0.1:8000", data={})
    assert tried == [("127.0.0.1", 8000)] * remote.TRIES


@pytest.mark.parametrize(
    "url, host",
    [
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("http://127.1.2.3", "127.1.2.3"),
        ("http://localhost:8000/v1", "localhost"),
        ("http://[::1]:8000", "::1"),
        ("http://gpu-server:8000", "proxy.example"),
        ("http://localhost.example.com", "proxy.example"),
        ("http://127.0.0.1.example.com", "proxy.example"),
    ],
)
def test_a_proxy_is_for_other_machines_only(monkeypatch, url, host):
    tried = []

    def connect(address, *args, **kwargs):
        tried.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RewardError, match="refused|URLError"):
        remote.ask(url)
    assert tried == [host] * remote.TRIES


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 302, 204, 504])
def test_other_answers_are_final(fake, monkeypatch, status):
    reward, asked = http(fake, monkeypatch, (status, {"error": "no such thing"} if status != 204 else b""))
    with pytest.raises(RewardError, match=f"http://127.0.0.1:.*got {status},"):
        reward(*ASKED)
    assert len(asked) == 2  # the one at the start, and one


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"<html>", "got 200, <html>"),
        ([1, 2, 3], "got 200, .1, 2, 3"),
        ({"score": [1, 2, 3]}, "'scores'"),
        ({"scores": 5}, "expected 3 numbers, got 5"),
        ({"scores": [1, 2, None]}, "expected 3 numbers"),
        ({"scores": [1, 2, "3"]}, "expected 3 numbers"),
        ({"scores": [1, 2, True]}, "expected 3 numbers"),
        ({"scores": [1, 2]}, "expected 3 finite numbers, got 2"),
        ({"scores": [1, 2, float("nan")]}, "expected 3 finite numbers, .*nan"),
        ({"scores": [1, 2, float("inf")]}, "expected 3 finite numbers, .*inf"),
        (b'{"scores": [1, 2, 3' + b" " * 2**20 + b"]}", "got 200"),  # larger than is read
    ],
)
def test_a_wrong_answer_is_not_a_score(fake, monkeypatch, answer, message):
    reward, _ = http(fake, monkeypatch, (200, answer))
    with pytest.raises(RewardError, match=message) as error:
        reward(*ASKED)
    assert len(str(error.value)) < 600


def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GRPO_GUARD_HTTP_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(BadInput, match="http://127.0.0.1:.*no answer, .*refused"):
            rewards.load("http")


@pytest.mark.parametrize(
    "url", [None, "", "127.0.0.1:8000", "ftp://a/b", "file:///etc/passwd", "http://", "http://u:secret@a:1", "http://a?token=secret"]
)  # fmt: skip
def test_a_url_that_is_none_is_refused_and_not_shown(monkeypatch, url):
    if url is not None:
        monkeypatch.setenv("GRPO_GUARD_HTTP_URL", url)
    with pytest.raises(BadInput, match="GRPO_GUARD_HTTP_URL: expected a URL like") as error:
        rewards.load("http")
    assert "secret" not in str(error.value)


def test_imagereward_says_where_it_lives(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)  # as where it is not installed
    with pytest.raises(BadInput, match="serve.*image-reward package.*GRPO_GUARD_IMAGEREWARD_URL"):
        rewards.load("imagereward")


def test_imagereward_is_asked_with_each_prompt_and_picture(monkeypatch):
    class Model:
        def requires_grad_(self, wanted):
            assert wanted is False
            return self

        def score(self, prompt, image):
            return {"a": 0.5, "b": -1.5, "c": 0}[prompt] + image.getpixel((0, 0))[0]

    package = type(sys)("ImageReward")
    package.load = lambda name: {"ImageReward-v1.0": Model()}[name]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert rewards.load("imagereward")(*ASKED) == [0.5, 49.5, 255]


# ------------------------------------------------------------------------------------------------------------
# UnifiedReward


@pytest.mark.parametrize(
    "text, score",
    [
        ("Final Score: 4", 4),
        ("It matches.\nFinal Score: 3.5", 3.5),
        ("**Final Score:** 2", 2),
        ("Final Score: 1\n...\nFinal Score: 5/5", 5),
    ],
)
def test_the_mark_is_read(text, score):
    assert remote.final_score(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "good",
        "Final Score: high",
        "Final Score: 0",
        "Final Score: 10",
        "Final Score: -3",
        "Score: 4",
    ],
)
def test_no_mark_is_not_a_score(text):
    with pytest.raises(RewardError, match="expected .Final Score:. and 1 to 5"):
        remote.final_score(text)


MODELS = (200, {"data": [{"id": "unified-7b"}]})


def completion(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def unified(fake, monkeypatch, *answers):
    url, asked = fake(MODELS, *answers)
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_API", f"{url}/v1")
    return rewards.load("unifiedreward"), asked


def test_unifiedreward_asks_for_every_picture_and_divides_by_5(fake, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_KEY", "sk-secret")
    reward, asked = unified(fake, monkeypatch, completion("Final Score: 4"))
    assert reward(*ASKED) == [0.8] * 3
    assert [path for path, _, _ in asked] == ["/v1/models"] + ["/v1/chat/completions"] * 3
    assert {headers["Authorization"] for _, headers, _ in asked} == {"Bearer sk-secret"}
    captions = {}
    for _, _, data in asked[1:]:
        assert data["model"] == "unified-7b" and data["temperature"] == 0
        picture, text = data["messages"][0]["content"]
        head, png = picture["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"
        value = Image.open(io.BytesIO(base64.b64decode(png))).getpixel((0, 0))[0]
        captions[text["text"].rsplit("Caption: ", 1)[1]] = value
    assert captions == {"a": 0, "b": 51, "c": 255}


def test_unifiedreward_with_a_model_of_ones_own(fake, monkeypatch):
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_MODEL", "mine")
    reward, asked = unified(fake, monkeypatch, completion("Final Score: 1"))
    assert reward(IMAGES[:1], ["{braces}"], [{}]) == [0.2]
    assert asked[1][2]["model"] == "mine" and "Authorization" not in asked[1][1]
    assert asked[1][2]["messages"][0]["content"][1]["text"].endswith("Caption: {braces}")


@pytest.mark.parametrize(
    "answer, message",
    [
        (completion("I cannot judge this"), "expected .Final Score:."),
        (completion("Final Score: 7"), "expected .Final Score:."),
        (completion(None), "expected .Final Score:."),
        ((200, {"choices": []}), "expected JSON with .'choices', 0"),
        ((401, {"error": "bad key sk-secret"}), "got 401, .*bad key [*]{3}"),
        ((401, "-" * 294 + "sk-secret"), "got 401, .*-[*]{3}"),
    ],
)
def test_a_judge_without_a_mark_stops_the_run(fake, monkeypatch, answer, message):
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_KEY", "sk-secret")
    reward, _ = unified(fake, monkeypatch, completion("Final Score: 4"), answer)
    with pytest.raises(RewardError, match=message) as error:
        reward(*ASKED)
    assert "sk-secret" not in str(error.value)


def test_unifiedreward_without_a_server(fake, monkeypatch):
    with pytest.raises(BadInput, match="GRPO_GUARD_UNIFIEDREWARD_API: expected a URL"):
        rewards.load("unifiedreward")
    url, _ = fake((200, {"object": "list"}))
    monkeypatch.setenv("GRPO_GUARD_UNIFIEDREWARD_API", url)
    with pytest.raises(BadInput, match="/models: expected JSON with .'data', 0"):
        rewards.load("unifiedreward")


# ------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_serves_a_reward_of_the_project(monkeypatch):
    """In a process of its own, which must not read itself though the variable is set."""
    from tiny import cards

    prompt = 'a red card with dots that says "CAT"'
    image = Image.fromarray(np.full((cards.HEIGHT, cards.WIDTH, 3), 120, np.uint8))
    expected = rewards.load("cards-colour")([image], [prompt], [{}])
    command = [sys.executable, "-m", "scorers.remote", "serve", "cards-colour", "--port", "0"]
    environment = os.environ | {"GRPO_GUARD_CARDS_COLOUR_URL": "http://127.0.0.1:9"}
    served = subprocess.Popen(
        command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = served.stdout.readline()
        assert re.fullmatch(r"cards-colour at http://127\.0\.0\.1:\d+\n", line)
        monkeypatch.setattr(remote, "GET_TIMEOUT", 10)
        monkeypatch.setattr(remote, "POST_TIMEOUT", 10)
        monkeypatch.setenv("GRPO_GUARD_CARDS_COLOUR_URL", line.split()[-1])
        assert rewards.load("cards-colour")([image], [prompt], [{}]) == pytest.approx(expected)
    finally:
        served.kill()
        served.wait()


def test_the_command_fails_in_one_line():
    command = [sys.executable, "-m", "scorers.remote", "serve", "http", "--port", "0"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "error: GRPO_GUARD_HTTP_URL: expected a URL" in done.stderr and "Traceback" not in done.stderr
