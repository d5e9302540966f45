"""`pd bench transfer` measures what it says, in a small edition."""

import json
import subprocess
import sys

import pytest

#: As the command line does it; 9 if torch was imported for it.
PROGRAM = """
import sys
from pd.cli import main
code = main(["bench", "transfer", *sys.argv[1:]])
sys.exit(9 if "torch" in sys.modules else code)
"""


def bench(*words):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_variant_is_measured_against_a_raw_copy_and_written_down(tmp_path):
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "transfer.json", tmp_path / "transfer.png"
    words = ["--bytes", "1M", "--sizes", "16K,64K", "--rounds", "2", "--latency-count", "5"]
    printed = bench(*words, "--json", str(results), "--plot", str(picture))
    data = json.loads(results.read_text())
    variants = {(row["variant"], row["digests"]) for row in data["throughput"]}
    assert variants == {("raw", False), ("shm", False), ("shm", True), ("tcp", False), ("tcp", True)}
    assert len(data["throughput"]) == 2 * 2 * 5
    for row in data["throughput"]:
        assert len(row["seconds"]) == 2 and row["gb_per_s"] > 0 and row["of_raw"] > 0
        assert row["sender_cpu_s_per_gb"] >= 0 and row["receiver_cpu_s_per_gb"] > 0
    assert len(data["coalescing"]) == 2 * 5 and all(row["gain"] > 0 for row in data["coalescing"])
    found = [(row["blocks"], row["posted"], row["variant"]) for row in data["latency"]]
    assert found == [
        (*what, variant)
        for what in ((1, "single"), (16, "merged"), (16, "single"))
        for variant in ("raw", "shm", "tcp")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    for said in ("churned", "checked", "coalescing", "merged", "raw: one memmove for each span"):
        assert said in printed


def test_a_user_names_the_way_of_direct_and_the_layout():
    printed = bench(
        *("--bytes", "1M", "--sizes", "64K", "--rounds", "1", "--latency-count", "5"),
        *("--pattern", "scattered", "--option", "transfer_memory=shm"),
    )
    assert "16 single" in printed and "tcp" not in printed and "merging" not in printed
