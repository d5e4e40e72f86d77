"""The page of `vft view`: what is in it, its script, and how it behaves in a browser where there is one."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from vft import Tokenizer, cli, demo, view
from vft.config import make_config, parse_config
from vft.tokens import VideoTokens
from vft.video import preprocess, read_video, to_uint8

FAST = ["--steps", "1", "--guidance", "none"]


@pytest.fixture(scope="module")
def tokenizer():
    config = make_config(
        codec="linear", encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32, registers=6,
        size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Tokenizer(parse_config(config), "small").requires_grad_(False)
    # a new decoder's branches are closed: no token would matter
    for parameter in model.decoder.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def clip(tokenizer):
    video = read_video(demo.CLIP, 32)
    source = to_uint8(preprocess(video.frames, 32))
    return view.describe(
        tokenizer, tokenizer.encode(video), source, name="</script><b>", note="a & b", steps=1, guidance=None
    )


@pytest.fixture(scope="module")
def bare(tokenizer):
    """Tokens that no video was made of, as a generator gives them."""
    ids = torch.randint(64000, (3, 6), generator=torch.Generator().manual_seed(1))
    tokens = VideoTokens(ids, 8, 9, 32, 32, "small", tokenizer.config.levels, 17, tokenizer.fingerprint)
    return view.describe(tokenizer, tokens, name="made", maps=2, steps=1, guidance=None)


@pytest.fixture(scope="module")
def path(clip, bare, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    view.write(path, [clip, bare], "{{PAYLOAD}} <i>", "credit & more")
    return path


class Page(HTMLParser):
    """Tags and their attributes in order, and the text of every script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)


def pixels(uri):
    kind, _, data = uri.partition(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def test_the_page_is_whole_and_asks_for_nothing(path):
    text = path.read_text()
    page = Page(text)
    assert page.open == [] and len(page.scripts) == 2
    # nothing is fetched: no address but pictures in the page, and a policy that forbids the rest
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|WebSocket", re.sub(r"base64,[\w+/=]+", "", text)
    )
    addresses = [a for _, attrs in page.tags for n, a in attrs.items() if n in ("src", "href", "action", "srcset")]
    assert all(a.startswith("data:") for a in addresses)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert text.count("{{PAYLOAD}} &lt;i&gt;") == 2 and "credit &amp; more" in text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and set(re.findall(r'at\("(\w+)"\)', text)) <= set(ids)


def test_what_the_page_shows_is_what_the_tokens_decode_to(path, clip, tokenizer):
    clips = json.loads(Page(path.read_text()).scripts[0])
    assert clips[0] == clip and clips[1]["source"] is None and len(clips[1]["registers"]) == 2
    assert [(level["k"], level["tokens"], level["bytes"]) for level in clip["levels"]] == [
        (k, 9 * k, 18 * k) for k in (1, 2, 4, 6)
    ]
    tokens = tokenizer.encode(read_video(demo.CLIP, 32))
    source = to_uint8(preprocess(read_video(demo.CLIP, 32).frames, 32)).numpy()
    for level in [*clip["levels"], {"sheet": clip["source"], "k": None}]:
        sheet = pixels(level["sheet"])
        # 33 frames, 6 a row
        assert sheet.shape == (6 * 32, 6 * 32, 3) and clip["columns"] == 6
        frames = sheet.reshape(6, 32, 6, 32, 3).swapaxes(1, 2).reshape(36, 32, 32, 3)
        assert (frames[33:] == 0).all()
        wanted = source
        if level["k"] is not None:
            wanted = to_uint8(tokenizer.decode(tokens.truncate(level["k"]), steps=1, guidance=None)).numpy()
            error = np.square(wanted.astype(float) - source).mean()
            assert level["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-6)
        assert (frames[:33] == wanted).all()


def test_a_map_is_bright_where_its_register_changes_the_picture(clip, tokenizer, monkeypatch):
    assert len(clip["registers"]) == 6 and sum(r["share"] for r in clip["registers"]) == pytest.approx(1)
    maps = np.stack([pixels(r["map"]) for r in clip["registers"]])
    assert maps.shape == (6, 32, 32) and maps.max() == 255

    def left_by_first(ids, noise, **_):
        """Latents whose left half alone follows register 0 and nothing else."""
        out = torch.zeros(1, *noise[0].shape)
        out[0, :, :, :, : out.shape[-1] // 2] = (ids[0][:, 0].float() / 64000)[None, :, None, None]
        return list(out)

    monkeypatch.setattr(tokenizer, "decode_latents", left_by_first)
    tokens = tokenizer.encode(read_video(demo.CLIP, 32))
    first, *others = view.register_maps(tokenizer, tokens, 6)
    picture = pixels(first["map"])
    assert first["share"] == 1 and picture[:, :16].min() > 0 and picture[:, 16:].max() == 0
    assert all(other["share"] == 0 and pixels(other["map"]).max() == 0 for other in others)


def test_long_videos_are_cut_and_said_to_be(tokenizer):
    ids = torch.zeros(40, 6, dtype=torch.int64)
    tokens = VideoTokens(ids, 8, 157, 32, 32, "small", tokenizer.config.levels, 17, tokenizer.fingerprint)
    made = view.describe(tokenizer, tokens, name="long", maps=0, steps=1, guidance=None)
    assert made["cut"] and made["frames"] == 129 and made["registers"] == []
    short = view.shortened(tokens, 6)
    assert short.frames == 6 and short.latent_frames == 3 and short.fingerprint == tokens.fingerprint


def test_large_sheets_are_jpeg():
    frames = torch.zeros(2, 1024, 768, 3, dtype=torch.uint8)
    assert view.sheet(frames).startswith("data:image/jpeg") and pixels(view.sheet(frames)).shape == (1024, 1536, 3)


def test_wrong_input_is_refused(tokenizer):
    tokens = tokenizer.encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="source must have the tokens' 5 frames, got 4"):
        view.describe(tokenizer, tokens, torch.zeros(4, 32, 32, 3, dtype=torch.uint8), name="a")
    with pytest.raises(ValueError, match="clips must hold at least one"):
        view.page([], "title")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_scripts_parse(path, tmp_path):
    form = (view.TEMPLATE.parent / "serve.html").read_text()
    for text in (Page(path.read_text()).scripts[1], Page(form).scripts[0]):
        script = tmp_path / "page.js"
        script.write_text(text)
        subprocess.run(["node", "--check", script], check=True)


def test_the_command(tmp_path, tokenizer, capsys):
    model, stored = str(tmp_path / "small.safetensors"), str(tmp_path / "bunny.vft")
    tokenizer.save(model)
    assert cli.main(["encode", str(demo.CLIP), "-o", stored, "--model", model]) == 0
    argv = ["view", stored, "--model", model, *FAST, "--maps", "1"]
    assert cli.main([*argv, "--source", str(demo.CLIP)]) == 0
    (clip,) = json.loads(Page((tmp_path / "bunny.vft.html").read_text()).scripts[0])
    assert clip["source"] and clip["name"] == "bunny.vft" and "128 x 128" in clip["note"]
    assert cli.main(argv) == 2 and "exists and was not named: -o replaces it" in capsys.readouterr().err
    output = tmp_path / "both.html"
    assert cli.main(["view", stored, str(demo.CLIP), *argv[2:], "-o", str(output)]) == 0
    clips = json.loads(Page(output.read_text()).scripts[0])
    assert [c["source"] is None for c in clips] == [True, False]
    # the same tokens, made at once or read
    assert [level["sheet"] for level in clips[0]["levels"]] == [level["sheet"] for level in clips[1]["levels"]]
    assert cli.main([*argv, "-o", f"{tmp_path}/a.txt"]) == 2 and "must end in .html" in capsys.readouterr().err
    assert (
        cli.main(["view", "b.vft", *argv[1:], "--source", "a"]) == 2 and "one input, got 2" in capsys.readouterr().err
    )


@pytest.mark.skipif(browser.found() is None, reason="chromium and chromedriver are not installed")
def test_in_a_browser(path):
    """The slider and the keys change the picture, the console stays empty, and the screenshot shows something."""
    bytes_of = "return document.getElementById('made').toDataURL()"
    with browser.Browser() as page:
        page.open(path.as_uri())
        page.until("return document.body.dataset.shown === 'true'")
        page.press("space")
        for _ in range(40):
            page.press("left")
        assert page.run("return document.body.dataset.frame") == "0"
        page.run("const k = document.getElementById('keep'); k.value = 0; k.dispatchEvent(new Event('input'))")
        seen = [page.run(bytes_of)]
        for k in ("2", "4", "6"):
            page.press("up")
            assert page.run("return document.body.dataset.k") == k
            seen.append(page.run(bytes_of))
        page.press("right")
        assert page.run("return document.body.dataset.frame") == "1"
        seen.append(page.run(bytes_of))
        assert len(set(seen)) == 5
        assert "108 bytes" in page.run("return document.getElementById('caption').textContent")
        page.run("document.querySelector('.map').click()")
        page.until("return document.querySelector('.map').getAttribute('aria-pressed') === 'true'")
        assert page.run(bytes_of) != seen[-1]
        picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        assert picture.shape[0] > 800 and picture.shape[1] == 1100 and picture.std() > 20
        page.press("n")
        assert page.run("return document.getElementById('left').hidden") is True
        page.press("space")
        first = page.run("return document.body.dataset.frame")
        page.until(f"return document.body.dataset.frame !== '{first}'")
        assert page.errors() == []
