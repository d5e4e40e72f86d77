"""Where the tests find what is not installed: the repository, and the published models' inputs and outputs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = ROOT / "tests" / "data" / "tokenizer"
GENERATORS = ROOT / "tests" / "data" / "generator"
