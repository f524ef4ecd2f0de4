"""The Python of README and docs runs as it stands; commands are those that CI and users run; tables are true."""

import re
from pathlib import Path

import pytest

from linrnn import layers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LAYERS = (ROOT / "docs" / "layers.md").read_text()


def test_python_examples():
    """In order, in one namespace, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_the_block_of_the_docs_is_short_and_runs():
    (block,) = re.findall(r"```python\n(.*?)```", LAYERS, re.S)
    definition = block[block.index("class Block") : block.index("block, x")].strip().splitlines()
    assert len(definition) <= 20
    exec(compile(block, "layers.md", "exec"), {})


@pytest.mark.parametrize("name", layers.available())
def test_the_table_of_layers_is_true(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", LAYERS, re.M)
    _, _, _, _, size, thousands, _, _, _ = (cell.strip() for cell in row.split("|"))
    layer = layers.build(name, d_model=512)
    assert size == ("grows" if layer.state_size is None else str(layer.state_size))
    assert int(thousands) == round(sum(p.numel() for p in layer.parameters()) / 1000)
    assert f"`{name}`" in README


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
        assert (ROOT / target).exists(), target


def test_ci_runs_the_test_command():
    assert "pip install 'torch>=2.10,<2.14' -e '.[dev]' && pytest" in README
    assert 'grep -m1 "pytest" README.md' in (ROOT / ".ci" / "run").read_text()
