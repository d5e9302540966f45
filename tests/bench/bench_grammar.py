"""How much one request with a grammar slows the others in its batch.

    python tests/bench/bench_grammar.py [--vocab 1024,128000] [--others 1,8,32] [--rounds 12]

One runner's worker, without processes. Decode steps of two batches alternate: `others` + 1 free requests, and `others`
free ones with one that writes JSON for a schema (an array of records that does not end). All are greedy, where sampling
costs least and a mask is felt most. With 1,024 tokens it is the built-in model; a larger vocabulary gets a model of its
own, random, with little more than its output layer, and a tokenizer with as many random merges. `ratio` is 1 + the
median of what a constrained step took more than the free one before it, by the median of the free ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.api.grammar import from_json_schema  # noqa: E402
from pd.messages import GrammarCompile  # noqa: E402
from pd.models.info import check_model  # noqa: E402
from pd.runner.grammar import Grammars  # noqa: E402
from pd.types import SamplingParams  # noqa: E402
from tests.oracle import tiny_model  # noqa: E402
from tests.worker_driver import BUILDERS, Driver  # noqa: E402

STEPS, PROMPT = 60, 40
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["guest", "member", "staff"]},
        "score": {"type": "number"},
    },
    "required": ["name", "age", "email", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 10_000}


def large_model(folder: Path, vocab: int) -> str:
    """A random model with `vocab` tokens, and a byte-level tokenizer of random merges."""
    path = tiny_model(folder, "llama", vocab_size=vocab, num_hidden_layers=4, hidden_size=256, intermediate_size=768)
    source, letters = random.Random(1), sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = [letter for letter in letters if letter.isascii()]
    tokens, merges = {"<|bos|>": 0, "<|eos|>": 1} | {letter: 2 + n for n, letter in enumerate(letters)}, []
    pool = [*plain]
    while len(tokens) < vocab:
        left, right = source.choice(pool), source.choice(pool if source.random() < 0.5 else plain)
        if len(left + right) <= 12 and left + right not in tokens:
            tokens[left + right] = len(tokens)
            merges.append((left, right))
            pool.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    tokenizer.save(str(Path(path) / "tokenizer.json"))
    return path


def steps(driver: Driver, grammar: str, others: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the steps without and with the constrained request, in pairs that follow each other at once."""
    free = SamplingParams(temperature=0.0, ignore_eos=True)
    ends = tuple(driver.info.eos_token_ids)
    bound = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=ends, grammar=grammar)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        groups = range(others + 1), range(others + 1, 2 * others + 2)
        for group, first in zip(groups, (free, bound), strict=True):
            for key in group:
                prompt = np.random.default_rng(key - group[0]).integers(5, 1000, PROMPT).tolist()
                driver.admit(key, prompt, first if key == group[0] else free)
            driver.step(dict.fromkeys(group, PROMPT))
        for turn in range(2 * STEPS):
            order = driver.order(dict.fromkeys(groups[turn % 2], 1))
            began = time.perf_counter()
            done = driver.worker.step(order)
            times[turn % 2].append(time.perf_counter() - began)
            assert not done.failed
        for key in range(2 * others + 2):
            driver.release(key)
            driver.free += driver.tracks.pop(key).blocks
    return np.array(times[0]), np.array(times[1])


def measure(vocab: int, folder: Path, others: list[int], count: int) -> list[dict[str, float]]:
    path = str(ROOT / "pd/builtin_model") if vocab == 1024 else large_model(folder, vocab)
    info = check_model(path, supported=BUILDERS)
    grammars = Grammars(path, info.vocab_size, info.eos_token_ids)
    driver = Driver(path, page_size=32, num_blocks=16 * (max(others) + 1), grammars=grammars)
    driver.pool.tensor.zero_()
    grammar = from_json_schema(SCHEMA, "schema")
    began = time.perf_counter()
    grammars.compile(GrammarCompile(1, grammar))
    while not (compiled := grammars.take_compiled()):
        time.sleep(0.001)
    assert not compiled[0].problem, compiled[0].problem
    found: list[dict[str, float]] = [{"vocab": vocab, "compiled_ms": (time.perf_counter() - began) * 1e3}]
    for number in others:
        free, bound = steps(driver, grammar, number, count)
        usual, more = float(np.median(free)), bound - free
        found.append(
            {
                "vocab": vocab,
                "others": number,
                "free_ms": usual * 1e3,
                "more_us": float(np.median(more)) * 1e6,
                "ratio": 1 + float(np.median(more)) / usual,
                "mean_ratio": float(bound.mean() / free.mean()),
                "p99_ratio": float(np.percentile(bound, 99) / np.percentile(free, 99)),
            }
        )
    grammars.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", default="1024,128000")
    parser.add_argument("--others", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    others = [int(number) for number in args.others.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        for vocab in args.vocab.split(","):
            for figures in measure(int(vocab), Path(folder), others, args.rounds):
                print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
