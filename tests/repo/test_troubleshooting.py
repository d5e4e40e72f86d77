"""docs/troubleshooting.md has every message that the code can raise at a user."""

import ast
import re

import pytest
from paths import ROOT

DOC = ROOT / "docs" / "troubleshooting.md"
# argument errors have one wording, and one heading
ARGUMENT = re.compile(r"\bmust\b")


def template(node: ast.expr) -> str:
    """The text of a message, ``...`` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "..."


def messages(source: str) -> list[str]:
    """Templates of the first arguments of errors that are raised and of warnings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        raised = isinstance(node, ast.Raise) and name.endswith("Error") and name != "AttributeError"
        if raised or name == "warn":
            found.append(re.sub(r"(\.\.\.)+", "...", template(call.args[0])))
    return found


def documented() -> list[re.Pattern]:
    """What headings and the first column of tables say."""
    lines = DOC.read_text().splitlines()
    cells = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    texts = re.findall(r"`([^`]+)`", "\n".join([line for line in lines if line.startswith("### ")] + cells))
    return [re.compile(".*".join(map(re.escape, re.split(r"\.\.\.+", text)))) for text in texts if text.strip(" .")]


def test_how_messages_are_found():
    source = """
def f(a):
    raise ValueError(f"a must be {a!r}{a}, " f"got {a}")
    raise OSError("b" + a) from None
    warnings.warn("c", stacklevel=2)
    raise KeyError
    raise AttributeError("d")
"""
    assert messages(source) == ["a must be ..., got ...", "b...", "c"]


@pytest.mark.parametrize("package", ["vft", "flexkernels"])
def test_every_message_is_documented(package):
    known = documented()
    missing = {
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in messages(path.read_text())
        # a message that was made elsewhere, such as FFmpeg's
        if text.strip(" .:") and not ARGUMENT.search(text) and not any(p.search(text) for p in known)
    }
    assert not missing, "\n".join(sorted(missing))
