"""`pd bench transfer` measures what it says, in a small edition."""

import argparse
import json

import pytest

from pd.bench import transfer
from pd.errors import ConfigError


def arguments(*words):
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    return parser.parse_args(words)


def test_every_variant_is_measured_against_a_raw_copy_and_written_down(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "transfer.json", tmp_path / "transfer.png"
    args = arguments("--bytes", "1M", "--sizes", "16K,64K", "--rounds", "2", "--latency-count", "5")
    args.json, args.plot = results, picture
    assert transfer.run(args) == 0
    data = json.loads(results.read_text())
    variants = {(row["variant"], row["digests"]) for row in data["throughput"]}
    assert variants == {("raw", False), ("shm", False), ("shm", True), ("tcp", False), ("tcp", True)}
    assert len(data["throughput"]) == 10
    for row in data["throughput"]:
        assert len(row["seconds"]) == 2 and row["gb_per_s"] > 0 and row["of_raw"] > 0
    found = [(row["variant"], row["spans"]) for row in data["latency"]]
    assert found == [("shm", 1), ("shm", 16), ("tcp", 1), ("tcp", 16)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--sizes", "0"], "--sizes"),
        (["--sizes", "64Q"], "--sizes"),
        (["--sizes", "100", "--bytes", "1M"], "--sizes"),
        (["--bytes", "x"], "--bytes"),
        (["--rounds", "0"], "--rounds"),
        (["--option", "novalue"], "--option"),
    ],
)
def test_a_wrong_argument_names_itself(words, flag):
    with pytest.raises(ConfigError) as caught:
        transfer.parse_options(arguments(*words))
    assert caught.value.field == flag


def test_a_size_may_have_a_unit():
    assert [transfer.parse_size(text, "") for text in ("8", "16K", "4m", "1G")] == [8, 16384, 4 << 20, 1 << 30]
