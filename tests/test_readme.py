"""The README's Python runs as it stands; its commands are those that CI and users run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples():
    """In order, in one namespace, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("line", re.findall(r"^lra .*", README, re.M))
def test_lra_commands_parse(line, capsys, monkeypatch):
    """Every `lra` line of the README is taken by the parser (what it does is tested in tests/lra)."""
    from lra.__main__ import main

    monkeypatch.setattr("sys.argv", [*line.split(), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None), capsys.readouterr().err


def test_no_placeholders_and_no_dead_links():
    assert "<!--" not in README
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_ci_runs_the_test_command():
    assert "pip install 'torch>=2.10,<2.14' -e '.[dev]' && pytest" in README
    assert 'grep -m1 "pytest" README.md' in (Path(__file__).parent.parent / ".ci" / "run").read_text()
