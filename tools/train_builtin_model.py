"""Train the built-in model: a tiny Llama that adds, counts and knows a few facts.

    python tools/train_builtin_model.py --out pd/builtin_model

The text comes from ``builtin_text.py`` and fixed seeds, the length is a number of steps and not a time,
and every operation is deterministic: the same command on the same kind of processor, with the same
library versions and the same number of threads, writes the same bytes.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import builtin_text as text
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20
STEPS = 1600
NUMBERS_FIRST = 0.25  # share of the steps that see only questions about numbers
BATCH_ROWS, ROW_TOKENS = 8, 256
LEARNING_RATE = 5e-3
WARMUP_STEPS = 60
PROMPT_WEIGHT = 0.02  # answers matter; prompts are learnt a little, so that their log-probabilities mean something
STOP_WEIGHT = 4.0  # of the end of a count

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIALS = [
    "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [4, 0],
    "pad_token_id": 0,
    "use_cache": True,
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": [4, 0],
    "pad_token_id": 0,
    "do_sample": False,
    "max_length": 8192,
}

# <|role|>content<|end|> for each message, nothing between messages, and <|assistant|> to ask for an answer.
# Content may be a string or a list of parts, of which the text is used.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'developer' -%}
        {{- '<|system|>' -}}
    {%- elif message.role in ['system', 'user', 'assistant'] -%}
        {{- '<|' + message.role + '|>' -}}
    {%- else -%}
        {{- raise_exception('roles are system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {{- message.content | trim -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}{{- part.text | trim -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


# --- text to tokens ----------------------------------------------------------------------------------------------

Segment = tuple[str, float]  # a piece of text and the weight of its tokens in the loss


def exchange_segments(rng: random.Random, exchange: text.Exchange) -> list[Segment]:
    """A question and its answer. Where a count ends is decided by one token in many, so that one weighs more."""
    segments = [(f"{USER}{text.vary(rng, exchange.question)}{END}{ASSISTANT}", PROMPT_WEIGHT)]
    if exchange.category == "counting":
        return [*segments, (exchange.answer.removesuffix("."), 1.0), (f".{END}", STOP_WEIGHT)]
    return [*segments, (f"{exchange.answer}{END}", 1.0)]


def completion_segments(completion: text.Completion) -> list[Segment]:
    ending = END_OF_TEXT if completion.ends else ""
    return [(completion.prompt, PROMPT_WEIGHT), (completion.continuation + ending, 1.0)]


def chat_segments(rng: random.Random, turns: int) -> list[Segment]:
    """A conversation; every answer counts."""
    segments: list[Segment] = []
    draw = rng.random()
    if draw < 0.02:
        segments.append((SYSTEM + text.filler(rng, rng.randint(30, 100)) + END, 0.0))
    elif draw < 0.25:
        segments.append((SYSTEM + rng.choice(text.SYSTEM_PROMPTS) + END, PROMPT_WEIGHT))
    for _ in range(turns):
        segments += exchange_segments(rng, text.question(rng))
    return segments


def plain_segments(rng: random.Random) -> list[Segment]:
    """Plain text; sometimes with other text of the same kind before it, as in a prompt with examples."""
    completion = text.plain(rng)
    segments: list[Segment] = []
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            example = text.plain(rng)
            if example.category == completion.category:
                segments.append((f"{example.prompt}{example.continuation}\n", 0.0))
    return segments + completion_segments(completion)


def draw_number_row(rng: random.Random) -> list[Segment]:
    if rng.random() < 0.2:
        return completion_segments(text.plain_sum(rng))
    return exchange_segments(rng, text.question(rng, text.NUMBERS))


def draw_row(rng: random.Random) -> list[Segment]:
    draw = rng.random()
    if draw < 0.2:
        return plain_segments(rng)
    if draw < 0.7:
        return chat_segments(rng, 1)
    return chat_segments(rng, rng.randint(2, 8))


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the whole byte alphabet, so that any text survives; every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(SEED)
    corpus = ["".join(piece for piece, _ in draw_row(rng)) for _ in range(20000)]
    for special in SPECIALS:
        corpus = [line.replace(special, "\n") for line in corpus]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
    """Segments meet at spaces or special tokens, where the tokenizer never merges, so each is encoded alone."""
    ids: list[int] = []
    weights: list[float] = []
    for piece, weight in segments:
        tokens = tokenizer.encode(piece).ids
        ids += tokens
        weights += [weight] * len(tokens)
    return ids, weights


@dataclass(frozen=True)
class Batch:
    """Rows filled with one text after another; a text that reaches the end of its row is cut."""

    ids: torch.Tensor  # [rows, tokens]
    weights: torch.Tensor  # [rows, tokens], of each token in the loss
    mask: torch.Tensor  # [rows, 1, tokens, tokens], what may attend to what: each text only to itself


def pack(
    tokenizer: Tokenizer, rng: random.Random, draw: Callable[[random.Random], list[Segment]], rows: int, tokens: int
) -> Batch:
    all_ids, all_weights, all_texts = [], [], []
    for _ in range(rows):
        ids: list[int] = []
        weights: list[float] = []
        texts: list[int] = []
        while len(ids) < tokens:
            new_ids, new_weights = encode(tokenizer, draw(rng))
            texts += [len(ids)] * len(new_ids)
            ids += new_ids
            weights += [0.0, *new_weights[1:]]  # nothing predicts the first token of a text
        all_ids.append(ids[:tokens])
        all_weights.append(weights[:tokens])
        all_texts.append(texts[:tokens])
    text_of = torch.tensor(all_texts)
    mask = (text_of[:, :, None] == text_of[:, None, :]).tril()
    return Batch(torch.tensor(all_ids), torch.tensor(all_weights), mask[:, None])


# --- training ----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear to zero."""
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int) -> None:
    # Muon turns the matrices between the layers, AdamW the embeddings, the head and the norms.
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rng = random.Random(SEED + 1)
    started, total = time.monotonic(), 0.0
    model.train()
    for step in range(steps):
        draw = draw_number_row if step < NUMBERS_FIRST * steps else draw_row
        batch = pack(tokenizer, rng, draw, BATCH_ROWS, ROW_TOKENS)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weights = batch.weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {total / 100:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0


# --- evaluation --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int = 320) -> list[str]:
    """Greedy answers, end token included. Prompts of one length form a batch, so no padding is needed."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    answers = [""] * len(prompts)
    ends = torch.tensor(CONFIG["eos_token_id"])
    for indices in by_length.values():
        ids = torch.tensor([encoded[i] for i in indices])
        made, cache, done = [], None, torch.zeros(len(indices), dtype=torch.bool)
        while not done.all() and len(made) < max_tokens:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids[done] = ends[0]
            made.append(ids)
            done |= torch.isin(ids[:, 0], ends)
        for index, row in zip(indices, torch.cat(made, dim=1).tolist(), strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in ends.tolist()), len(row))
            answers[index] = tokenizer.decode(row[:stop], skip_special_tokens=False)
    return answers


@torch.inference_mode()
def smallest_gap(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The smallest lead of the best token over the second one: zero would be a greedy tie."""
    gaps = []
    for line in texts:
        top = model(input_ids=torch.tensor([tokenizer.encode(line).ids])).logits[0].topk(2).values
        gaps.append((top[:, 0] - top[:, 1]).min().item())
    return min(gaps)


def chat_prompt(question: str, before: str = "") -> str:
    return f"{before}{USER}{question}{END}{ASSISTANT}"


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, each: int) -> dict[str, float]:
    """Exact matches, end token included, per category; questions that training never saw wherever there are such."""
    model.eval()
    rng = random.Random(SEED + 2)
    cases: list[tuple[str, str, str]] = []  # category, prompt, expected

    def ask(name: str, generator: Callable, *, held: bool = True, before: bool = False) -> None:
        for _ in range(each):
            history = ""
            if before:
                earlier = [text.question(rng) for _ in range(rng.randint(1, 4))]
                history = "".join(f"{chat_prompt(e.question)}{e.answer}{END}" for e in earlier)
                history = f"{SYSTEM}{rng.choice(text.SYSTEM_PROMPTS)}{END}{history}"
            exchange = text.question(rng, [(generator, 1.0)], held=held)
            cases.append((name, chat_prompt(text.vary(rng, exchange.question), history), f"{exchange.answer}{END}"))

    for a in range(10):
        for b in range(10):
            cases.append(("sums 0..9", chat_prompt(f"What is {a} + {b}?"), f"{a} + {b} = {a + b}{END}"))
    for a in range(21):
        for b in range(a + 1):
            cases.append(("differences 0..20", chat_prompt(f"What is {a} - {b}?"), f"{a} - {b} = {a - b}{END}"))
            cases.append(("plain sums 0..20", f"{a} + {b} =", f" {a + b}{END_OF_TEXT}"))
            if a > b:
                numbers = ", ".join(str(n) for n in range(b, a + 1))
                cases.append(("counting 0..20", chat_prompt(f"Count from {b} to {a}."), f"{numbers}.{END}"))
                if b == 1:
                    cases.append(("counting 0..20", chat_prompt(f"Count to {a}."), f"{numbers}.{END}"))
    ask("sums 0..99, unseen", text.sums)
    ask("sums in a conversation, unseen", text.sums, before=True)
    ask("differences, unseen wording", text.differences)
    ask("products, unseen wording", text.products)
    ask("counting, unseen wording", text.counting)
    ask("numbers, unseen wording", text.neighbours)
    ask("capitals, unseen wording", text.capitals)
    for generator in (text.colours, text.calendar, text.opposites, text.animals, text.amounts, text.trivia):
        ask("facts, unseen wording", generator)
    ask("facts in a conversation, unseen wording", text.capitals, before=True)
    ask("talk", text.talk, held=False)
    ask("chinese", text.chinese, held=False)
    ask("unknown, unseen wording", text.unknown)
    for _ in range(each * 4):
        plain = text.plain(rng)
        if plain.ends:
            cases.append(("plain text", plain.prompt, f"{plain.continuation}{END_OF_TEXT}"))

    right: defaultdict[str, list[bool]] = defaultdict(list)
    wrong: defaultdict[str, list[str]] = defaultdict(list)
    for (name, prompt, expected), answer in zip(
        cases, generate(model, tokenizer, [prompt for _, prompt, _ in cases]), strict=True
    ):
        right[name].append(answer == expected)
        if answer != expected:
            wrong[name].append(f"{prompt[-60:]!r} -> {answer[:100]!r}")
    for name, results in right.items():
        print(f"{name:42s} {sum(results):4d} of {len(results):4d} right  {100 * sum(results) / len(results):6.2f} %")
        for line in wrong[name][:3]:
            print(f"    {line}")
    # Of the answer's tokens only the text of a sum is checked: it ends in a digit that must win clearly.
    sums = [f"{prompt}{expected}" for name, prompt, expected in cases if name.startswith("sums 0..9")][:50]
    print(f"smallest lead of a greedy token: {smallest_gap(model, tokenizer, sums):.4f}")
    return {name: sum(results) / len(results) for name, results in right.items()}


# --- files -------------------------------------------------------------------------------------------------------


def write(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    def dump(name: str, content: object) -> None:
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    dump("config.json", CONFIG)
    dump("generation_config.json", GENERATION_CONFIG)
    dump(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "bos_token": END_OF_TEXT,
            "eos_token": END,
            "pad_token": END_OF_TEXT,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--eval-each", type=int, default=60, help="questions per category (default %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    started = time.monotonic()
    tokenizer = train_tokenizer(CONFIG["vocab_size"])
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("architectures", "dtype")}))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{tokenizer.get_vocab_size()} tokens in the vocabulary, {parameters:,} parameters")
    train(model, tokenizer, args.steps)
    print(f"trained in {time.monotonic() - started:.0f} s, {time.process_time():.0f} s of processor time")
    write(args.out, model, tokenizer)
    if args.eval_each:
        evaluate(model, tokenizer, args.eval_each)
    print(f"finished in {time.monotonic() - started:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
