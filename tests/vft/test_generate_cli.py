"""``vft generate``: videos and token files from classes and captions, and one line for every wrong request."""

import re
import shutil
import sys
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vft
from vft import VideoTokens, checkpoint, cli, decoding, generation, text, video
from vft.config import make_config, parse_config, parse_generator_config
from vft.words import embed

FAST = ["--steps", "1", "--guidance", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random models: a tokenizer of 8 registers and 64 ids, a class- and a text-conditional generator."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = make_config(
        codec="linear", encoder_width=32, encoder_depth=1, decoder_width=32, decoder_depth=1, head_dim=32,
        registers=8, levels=(4, 4, 4), size=32,
    )  # fmt: skip
    vft.Tokenizer(parse_config(config), "tok").save(root / "tok.safetensors")
    common = {"depth": 1, "vocab": 64, "seq_len": 40, "tokenizer": str(root / "tok.safetensors")}
    classes = ["doing yoga", "archery", "zumba"]
    for name, raw in {
        "class": {"cond": "class", "n_classes": 3, "classes": classes},
        "text": {"cond": "text", "ctx_dim": 768, "n_ctx_null": 2},
        "lost": {"cond": "class", "n_classes": 3, "tokenizer": None},
        "wide": {"cond": "class", "n_classes": 3, "vocab": 65},
    }.items():
        model = vft.Generator(parse_generator_config({**common, **raw}))
        torch.nn.init.normal_(model.head.weight)
        model.save(root / f"{name}.safetensors")
    captions = {"text_emb": torch.randn(2, 5, 768), "text_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    save_file(captions, root / "captions.safetensors")
    save_file({"text_emb": torch.randn(3, 768)}, root / "one.safetensors")
    save_file({"other": torch.zeros(1)}, root / "other.safetensors")
    save_file({"text_emb": torch.zeros(1, 3, 768), "text_mask": torch.zeros(1, 4)}, root / "ragged.safetensors")
    return root


def run(folder, *argv):
    argv = [str(folder / a[1:]) + ".safetensors" if str(a).startswith("@") else str(a) for a in argv]
    return cli.main(["generate", *argv])


def test_samples_are_named_in_words():
    classes = ("pan", "zoom")
    assert generation.names({"class_id": "zoom"}, classes, 2) == ["zoom 1", "zoom 2"]
    assert generation.names({"class_id": 0}, classes, 1) == ["pan 1"]
    assert generation.names({"class_id": 1}, (), 1) == ["class 1 1"]
    assert generation.names({}, (), 1) == ["sample 1"]
    assert generation.names({"text_emb": 0}, (), 1, "red disc") == ["red disc 1"]
    assert generation.names({}, (), 1, "a cat " * 20) == ["a cat a cat a cat a cat a cat... 1"]
    assert [generation.in_words(k) for k in (1, 4)] == ["1 token\na frame", "4 tokens\na frame"]


def test_videos_of_a_class(tmp_path, folder, capsys):
    argv = ["--model", "@class", "--class-name", "doing yoga", "-k", "5", "--n", "3", "--seed", "1", *FAST]
    assert run(folder, *argv, "-o", tmp_path / "out.mp4") == 0
    movie = video.read_video(tmp_path / "out.mp4")
    assert movie.frames.shape == (17, 64, 64, 3) and movie.fps == 8
    # three samples at k = 1, 4, 5
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.height > 9 * 128
    assert "3 videos of 17 frames, 5 x 5 = 25 tokens each" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "out.png"]


def test_only_what_is_named_is_replaced(tmp_path, folder, capsys):
    argv = ["--model", "@class", "--class-name", "zumba", "-k", "1", "--frames", "1", *FAST]
    for name in ("keep.png", "keep.mp4", "keep-1.vft"):
        (tmp_path / name).write_text("mine")
    assert run(folder, *argv, "-o", tmp_path / "keep.mp4") == 2
    assert f"exists and was not named: --sheet {tmp_path}/keep.png replaces it" in capsys.readouterr().err
    assert run(folder, *argv, "-o", tmp_path / "keep.vft", "--tokens-only", "--n", "2") == 2
    assert "keep-1.vft' exists and was not named: give another -o" in capsys.readouterr().err
    assert {p.read_text() for p in tmp_path.iterdir()} == {"mine"} and len(list(tmp_path.iterdir())) == 3
    for name in ("other.txt", "none/other.png"):
        assert run(folder, *argv, "-o", tmp_path / "keep.mp4", "--sheet", tmp_path / name) == 2
    assert run(folder, *argv, "-o", tmp_path / "keep.mp4", "--sheet", tmp_path / "keep.png") == 0
    assert Image.open(tmp_path / "keep.png").height > 128
    assert len(video.read_video(tmp_path / "keep.mp4").frames) == 1 and len(list(tmp_path.iterdir())) == 3


def test_inputs_are_never_outputs(tmp_path, folder, capsys):
    caption = shutil.copy(folder / "one.safetensors", tmp_path / "a.vft")
    argv = ["--model", "@text", "--text-emb", caption, "--tokens-only", "-k", "1", "-o", caption]
    assert run(folder, *argv) == 2 and "than the input" in capsys.readouterr().err


def test_graphs_are_left_to_the_device(tmp_path, folder, capsys, monkeypatch):
    seen, levels = [], decoding.levels
    monkeypatch.setattr(decoding, "levels", lambda *a: (seen.append(a[-1]), levels(*a))[1])
    argv = ["--model", "@class", "--class-name", "0", "--tokens-only", "-k", "1", "-o", tmp_path / "a.vft"]
    for options in ([], ["--no-cuda-graph"]):
        assert run(folder, *argv, "--device", "cpu", *options) == 0
    assert seen == [None, False]
    assert run(folder, *argv, "--device", "cpu", "--cuda-graph") == 2
    assert "cuda_graph must be off on cpu" in capsys.readouterr().err


def test_token_files_hold_what_the_library_generates(tmp_path, folder, capsys):
    argv = ["--model", "@class", "--class-name", "zumba", "--n", "2", "--seed", "3", "--frames", "2", "--tokens-only"]
    options = ["--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--temperature", "0.8", "--token-guidance", "1.5"]
    assert run(folder, *argv, *options, "-k", "4", "--fps", "5", "-o", tmp_path / "a.vft") == 0
    gen = vft.Generator.from_pretrained(folder / "class.safetensors")
    want = gen.generate(
        class_id=2, n=2, frames=2, tokens_per_frame=4, seed=3, top_k=20, top_p=0.9, min_p=0.01, temperature=0.8,
        guidance=1.5,
    )  # fmt: skip
    for i in range(2):
        tokens = VideoTokens.load(tmp_path / f"a-{i}.vft")
        assert torch.equal(tokens.ids, want[i])
        assert (tokens.frames, tokens.fps, tokens.height, tokens.model) == (5, 5, 32, "tok")
    assert "2 x 4 = 8 tokens" in capsys.readouterr().out
    # and decodes
    argv = ["decode", f"{tmp_path}/a-0.vft", "-o", f"{tmp_path}/a.mp4", "--model", str(folder / "tok.safetensors")]
    assert cli.main([*argv, *FAST]) == 0


def test_all_registers_that_fit_are_the_default(tmp_path, folder):
    argv = ["--model", "@class", "--class-name", "1", "--tokens-only", "-o", tmp_path / "a.vft"]
    assert run(folder, *argv) == 0
    assert VideoTokens.load(tmp_path / "a.vft").ids.shape == (5, 8)
    assert run(folder, *argv, "--frames", "20", "--int8") == 0
    assert VideoTokens.load(tmp_path / "a.vft").ids.shape == (20, 2)


def test_captions_from_a_file(tmp_path, folder):
    argv = ["--model", "@text", "--tokens-only", "-k", "3", "--temperature", "0"]
    assert run(folder, *argv, "--text-emb", "@captions", "-o", tmp_path / "a.vft") == 0
    emb, mask = text.load_embeddings(folder / "captions.safetensors")
    gen = vft.Generator.from_pretrained(folder / "text.safetensors")
    want = gen.generate(text_emb=emb, text_mask=mask, tokens_per_frame=3, temperature=0)
    for i in range(2):
        assert torch.equal(VideoTokens.load(tmp_path / f"a-{i}.vft").ids, want[i])
    assert run(folder, *argv, "--text-emb", "@one", "--n", "2", "-o", tmp_path / "b.vft") == 0


class FakeEncoder:
    """The part of transformers that is used, with embeddings one can predict."""

    def __init__(self, width=768):
        self.width, self.loaded = width, []

    def module(self):
        names = {"AutoTokenizer": self.auto_tokenizer(), "UMT5EncoderModel": self.encoder()}
        return types.SimpleNamespace(**names)

    def auto_tokenizer(self):
        def tokenize(captions, padding, truncation, max_length, return_tensors):
            assert padding and truncation and return_tensors == "pt"
            ids = [[len(word) for word in caption.split()][:max_length] for caption in captions]
            longest = max(map(len, ids))
            rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
            return {"input_ids": rows, "attention_mask": (rows > 0).long()}

        return types.SimpleNamespace(from_pretrained=lambda reference: self.load(reference, tokenize))

    def encoder(self):
        class Encoder:
            def to(self, **_):
                return self

            def eval(self):
                return self

            def __call__(_, input_ids, attention_mask):
                hidden = input_ids[..., None].float().expand(-1, -1, self.width)
                return types.SimpleNamespace(last_hidden_state=hidden)

        return types.SimpleNamespace(from_pretrained=lambda reference: self.load(reference, Encoder()))

    def load(self, reference, result):
        if reference == "nowhere":
            raise OSError("nowhere is not a model\nand a second line")
        self.loaded.append(reference)
        return result


def test_a_caption_through_an_encoder(tmp_path, folder, monkeypatch, capsys):
    fake = FakeEncoder()
    monkeypatch.setitem(sys.modules, "transformers", fake.module())
    emb, mask = text.encode_captions(["a cat runs", "dog"], "some/encoder", max_length=2)
    assert (
        emb.shape == (2, 2, 768) and emb[0, :, 0].tolist() == [1, 3] and mask.tolist() == [[True, True], [True, False]]
    )
    argv = ["--model", "@text", "--tokens-only", "-k", "3", "--temperature", "0", "-o", tmp_path / "a.vft"]
    assert run(folder, *argv, "--text", "a cat runs") == 0
    assert fake.loaded[-1] == "google/umt5-base"
    emb, _ = text.encode_captions(["a cat runs"], "x")
    want = vft.Generator.from_pretrained(folder / "text.safetensors").generate(
        text_emb=emb, tokens_per_frame=3, temperature=0
    )
    assert torch.equal(VideoTokens.load(tmp_path / "a.vft").ids, want[0])
    capsys.readouterr()
    assert run(folder, *argv, "--text", "a", "--text-encoder", "nowhere") == 2
    assert capsys.readouterr().err == (
        "vft: error: text encoder 'nowhere' could not be loaded: nowhere is not a model\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "@class"], "class_id must be given"),
        (["--model", "@class", "--class-name", "doing yogi"], "is not known: did you mean 'doing yoga'?"),
        (["--model", "@class", "--class-name", "foo"], "the classes are doing yoga, archery, zumba"),
        (["--model", "@class", "--class-name", "3"], "class_id must lie in 0..2, got 3"),
        (["--model", "@class", "--text", "a cat"], "conditioned on classes: give --class-name"),
        (["--model", "@class", "--text-emb", "@captions"], "conditioned on classes: give --class-name"),
        (["--model", "@class", "--class-name", "0", "--text", "a"], "not allowed with argument"),
        (["--model", "@text"], "text_emb must be given"),
        (["--model", "@text", "--class-name", "yoga"], "class_id must not be given: this model is conditioned on text"),
        (["--model", "@text", "--text-emb", "missing"], "missing: No such file"),
        (["--model", "@text", "--text-emb", "@other"], "must hold text_emb and at most text_mask, got other"),
        (["--model", "@text", "--text-emb", "@ragged"], "got [1, 3, 768] and [1, 4]"),
        (["--model", "@text", "--text-emb", "@captions", "--n", "3"], "must hold 1 or n = 3 rows, got 2"),
        (["--model", "@text", "--text", "a cat"], "captions need transformers: pip install 'flexkernels[text]'"),
        (["--model", "@lost", "--class-name", "0"], "names no tokenizer: give one with --tokenizer"),
        (["--model", "@lost", "--class-name", "archery", "--tokenizer", "@tok"], "the model names no classes"),
        (["--model", "@wide", "--class-name", "0"], "the generator has 65 ids, the tokenizer 64"),
        (["--model", "@tok", "--class-name", "0"], "the generator's config must have the field 'depth'"),
        (["--model", "@class", "--class-name", "0", "--frames", "6", "-k", "8"], "at most seq_len = 40, got 6 * 8"),
        (["--model", "@class", "--class-name", "0", "--frames", "1", "-k", "9"], "at most the tokenizer's 8, got 9"),
        (["--model", "@class", "--class-name", "0", "-k", "0"], "must be at least 1, got 0"),
        (["--model", "@class", "--class-name", "0", "--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["--model", "@class", "--class-name", "0", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--model", "@class", "--class-name", "0", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--model", "@class", "--class-name", "0", "-o", "OUT.txt"], "must end in .mp4"),
        (["--model", "@class", "--class-name", "0", "--tokens-only"], "must end in .vft"),
        (["--model", "@class", "--class-name", "0", "-o", "OUT/none/a.mp4"], "does not exist"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(tmp_path, folder, capsys, monkeypatch, argv, message):
    # as if transformers were not installed
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = [a.replace("OUT", f"{tmp_path}/out") for a in argv]
    if "-o" not in argv:
        argv += ["-o", f"{tmp_path}/out.mp4"]
    assert run(folder, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"vft: error: [^\n]+\n", err) and message in err, err
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_generator_is_the_default(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path)
    argv = ["--class-name", "yoga", "--tokens-only", "-o", tmp_path / "a.vft"]
    assert run(folder, *argv) == 2
    assert "must be an embedded model (none)" in capsys.readouterr().err
    shutil.copy(folder / "class.safetensors", tmp_path / "tiny_generator.safetensors")
    assert run(folder, *argv) == 2
    assert "did you mean 'doing yoga'?" in capsys.readouterr().err
    argv[1] = "doing yoga"
    assert run(folder, *argv) == 0
    assert VideoTokens.load(tmp_path / "a.vft").ids.shape == (5, 8)


def test_the_embedded_generator_of_captions_is_the_default_of_captions(tmp_path, folder, capsys):
    argv = ["-k", "1", "--frames", "2", "--temperature", "0", "--tokens-only"]
    assert run(folder, *argv, "--text", "a red disc, moving left", "-o", tmp_path / "a.vft") == 0
    emb, mask = embed(["red disc moving left"])
    save_file({"text_emb": emb, "text_mask": mask.int()}, tmp_path / "emb.safetensors")
    assert run(folder, *argv, "--text-emb", tmp_path / "emb.safetensors", "-o", tmp_path / "b.vft") == 0
    generator = vft.Generator.from_pretrained("tiny_text")
    want = generator.generate(text_emb=emb, text_mask=mask, frames=2, tokens_per_frame=1, temperature=0)[0]
    assert all(torch.equal(VideoTokens.load(tmp_path / name).ids, want) for name in ("a.vft", "b.vft"))
    capsys.readouterr()
    assert cli.main(["info", "tiny_text"]) == 0
    said = capsys.readouterr().out
    assert "of the words red, orange" in said and "classes" not in said and re.search(r"tokenizer +tiny\n", said)


def test_info(folder, capsys):
    for name, words in (
        ("class", ["generator", "3 classes", "doing yoga, archery, zumba", "40 tokens", "64 ids", "tok.safetensors"]),
        ("text", ["768"]),
    ):
        assert cli.main(["info", str(folder / f"{name}.safetensors")]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), out


def test_grid():
    clips = [torch.full((2, 4, 6, 3), i, dtype=torch.uint8) for i in range(3)]
    out = generation.grid(clips)
    assert out.shape == (2, 8, 12, 3)
    assert out[0, ::4, ::6, 0].tolist() == [[0, 1], [2, 255]]
    assert generation.grid(clips[:1]).shape == (2, 4, 6, 3)
