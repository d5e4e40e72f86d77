"""`vft serve`: uploads become pages; what is too large, damaged or of another site is refused in one line."""

import http.client
import json
import re
import threading

import browser
import pytest
import torch

from vft import Tokenizer, demo
from vft.config import make_config, parse_config
from vft.serve import HOST, Server

MOST = 1 << 20


@pytest.fixture(scope="module")
def server():
    config = make_config(
        codec="linear", encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=2,
        size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = Tokenizer(parse_config(config), "small").requires_grad_(False)
    with Server(tokenizer, 0, MOST, steps=1, guidance=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method="GET", path="/", body=None, **headers):
    """Status and text of one request; headers with _ for -."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def clips(page):
    return json.loads(re.search(r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL)[1])


def test_it_listens_on_this_machine_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_video_and_its_tokens_become_pages(server):
    status, page = ask(server, "POST", "/view", demo.CLIP.read_bytes(), X_Name="a%20b%3Ci%3E.mp4")
    (clip,) = clips(page)
    assert status == 200 and clip["name"] == "a b<i>.mp4" and clip["frames"] == 33 and clip["source"]
    assert "<title>a b&lt;i&gt;.mp4</title>" in page
    from vft.video import read_video

    tokens = server.tokenizer.encode(read_video(demo.CLIP, 16)).to_bytes()
    status, page = ask(server, "POST", "/view", tokens, X_Name="../../x.vft")
    assert status == 200 and clips(page)[0]["name"] == "x.vft" and clips(page)[0]["source"] is None
    assert clips(page)[0]["levels"] == [{**level, "psnr": None} for level in clip["levels"]]


def test_what_cannot_be_shown_is_refused_in_one_line(server):
    status, text = ask(server, "POST", "/view", b"no video at all", X_Name="notes.txt")
    assert status == 422 and text.startswith("notes.txt: ") and "/" not in text and "\n" not in text
    status, text = ask(server, "POST", "/view", b"VFT\x1a and no more", X_Name="a.vft")
    assert status == 422 and text.startswith("a.vft: ")
    status, text = ask(server, "POST", "/view", b"", X_Name="empty")
    assert status == 411 and "with its length" in text
    # refused by its length, before it is sent
    status, text = ask(server, "POST", "/view", None, Content_Length=str(MOST + 1))
    assert (status, text) == (413, f"a file must have at most 1 MiB, got {MOST + 1} bytes")
    assert ask(server, path="/etc/passwd")[0] == 404 and ask(server, "POST", "/", b"x")[0] == 404


def test_pages_of_other_sites_are_refused(server):
    port = server.server_port
    assert ask(server, Host=f"evil.example:{port}")[0] == 403
    assert ask(server, "POST", "/view", b"x", Origin="http://evil.example")[0] == 403
    assert ask(server, Host=f"localhost:{port}")[0] == 200
    assert ask(server, Origin=f"http://localhost:{port}")[0] == 200


@pytest.mark.skipif(browser.found() is None, reason="chromium and chromedriver are not installed")
def test_in_a_browser(server, tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with browser.Browser() as page:
        page.open(f"http://127.0.0.1:{server.server_port}")
        page.type_into("#file", str(tmp_path / "notes.txt"))
        page.until("return document.getElementById('said').textContent.startsWith('notes.txt: ')")
        # the browser reports the refusal itself
        assert all("422" in error for error in page.errors())
        page.type_into("#file", str(demo.CLIP))
        page.until("return document.body.dataset.shown === 'true'")
        assert page.run("return document.title") == demo.CLIP.name
        assert page.errors() == []
