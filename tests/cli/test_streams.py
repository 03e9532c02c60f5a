"""`polyrank streams`: list, show, copy, validate; and what `polyrank run` says of a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.cli import main

SHOP = """
kind: text-to-label
scenario: class-incremental
prompt: "{text}:"
tasks:
  - {name: news, path: news.jsonl, train: 0.5, test: 0.5, labels: [a, b]}
"""


@pytest.fixture
def shop():
    rows = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(8)]
    Path("news.jsonl").write_text("\n".join(rows), encoding="utf-8")
    Path("shop.yaml").write_text(SHOP, encoding="utf-8")


def printed(capsys, *words):
    """Run a command that must succeed in this process; return what it prints."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    return captured.out


def faults(capsys, *words):
    """Run a command that must fail in this process; return its error lines."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    return captured.err.strip().splitlines()


def test_all_streams_are_listed(capsys):
    text = printed(capsys, "streams")
    for name in ("digits", "standard-cl", "long-sequence", "trace", "split-cifar100", "x-tail"):
        assert name in text


def test_a_stream_is_shown_with_its_sizes(capsys, shop):
    text = printed(capsys, "streams", "digits")
    assert "digits (class-incremental)" in text
    assert "train 207" in text
    text = printed(capsys, "streams", "shop.yaml")
    assert "train 4" in text
    assert "2: a, b" in text
    assert "exact_match" in text


def test_a_stream_of_the_hub_is_shown_without_the_hub(capsys):
    text = printed(capsys, "streams", "standard-cl")
    assert "fancyzhx/ag_news" in text
    assert "order-3: yahoo, amazon, agnews, dbpedia" in text
    assert "10 by label" in printed(capsys, "streams", "split-cifar100")
    Path("mine.yaml").write_text("use: standard-cl\noptions: {order: order-2}\n", encoding="utf-8")
    assert "fancyzhx/ag_news" in printed(capsys, "streams", "mine.yaml")
    (line,) = faults(capsys, "streams", "standard-cl", "--validate")
    assert "cannot load 'fancyzhx/dbpedia_14'" in line
    (line,) = faults(capsys, "streams", "trace", "--validate")
    assert line.startswith("error: trace.yaml: root: is missing")


def test_a_copy_can_be_edited_and_never_overwrites(capsys):
    assert "wrote mine.yaml" in printed(capsys, "streams", "trace", "--copy", "mine.yaml")
    text = Path("mine.yaml").read_text(encoding="utf-8")
    assert "kind: generation" in text
    (line,) = faults(capsys, "streams", "x-tail", "--copy", "mine.yaml")
    assert line == "error: copy: mine.yaml exists; choose another name, or remove it"
    assert Path("mine.yaml").read_text(encoding="utf-8") == text
    (line,) = faults(capsys, "streams", "digits", "--copy", "other.yaml")
    assert "'digits' is no ready definition" in line
    (line,) = faults(capsys, "streams", "trace", "--copy", "no/where.yaml")
    assert "cannot write no/where.yaml: No such file or directory" in line
    assert len(faults(capsys, "streams", "mine.yaml")) == 8


def test_validation_reads_everything(capsys, shop):
    assert "valid; hash " in printed(capsys, "streams", "shop.yaml", "--validate")
    with Path("news.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"label": 1}')
    (line,) = faults(capsys, "streams", "shop.yaml", "--validate")
    assert "news.jsonl, row 8: 'text' is empty" in line


THREE = """
kind: text-to-label
scenaro: class-incremental
prompt: "{text}:"
tasks:
  - {name: news, path: nws.jsonl, train: 0.5, test: 0.5}
  - {name: mail, path: news.jsonl, train: 0.5, test: 0.5, columns: {label: lable}}
"""


def test_three_faults_are_three_lines_before_anything_is_loaded(shop, capsys):
    Path("three.yaml").write_text(THREE, encoding="utf-8")
    code = (
        "import sys\nfrom polyrank.cli import main\n"
        "try: main(['streams', 'three.yaml'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: three.yaml: ") for line in lines)
    assert lines[1].endswith("did you mean 'news.jsonl'?")
    assert faults(capsys, "run", "--stream", "three.yaml") == lines
    assert not Path("runs").exists()


def test_a_stream_that_needs_a_model_says_so(capsys, shop):
    (line,) = faults(capsys, "run", "--stream", "shop.yaml")
    assert "brings no data to train one on; pass --model" in line
    assert not Path("runs").exists()
