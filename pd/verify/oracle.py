"""transformers as the reference: float32, eager attention, no KV cache, every position computed from scratch.

It follows the deployment's own tokens: at each position it says which token is right after them and how likely it is,
so that one damaged position is found where it is, not where the texts part. Keys and values are rounded as the
deployment's KV blocks hold them. Draws are pd's own (counter-based noise) on
transformers' logits. A grammar's masks are not known here: of constrained requests the logprobs count.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from pd.api.native import NativeSampling
from pd.api.params import Defaults, ModelLimits, resolve
from pd.errors import ConfigError
from pd.models.info import check_model
from pd.runner.inputs import Growing, Request
from pd.runner.sampler import sample
from pd.types import SamplingParams
from pd.verify.compare import Output, Token
from pd.verify.rounding import rounded_kv
from pd.verify.workload import TOPS, Case

_CONSTRAINED = ("json_schema", "regex", "ebnf")


class Oracle:
    """Raises ConfigError when transformers is not installed or cannot load the model."""

    def __init__(self, path: Path, kv_cache_dtype: str = "auto") -> None:
        """`kv_cache_dtype`: what the deployment's KV blocks hold; keys and values are rounded so."""
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ModuleNotFoundError as error:
            raise ConfigError("--reference", f"{error.name} is not installed", "pip install transformers") from error
        logging.disable_progress_bar()
        info = check_model(str(path), kv_cache_dtype=kv_cache_dtype, tokenizer=False)
        self._limits = ModelLimits(info.vocab_size, info.context_length, info.eos_token_ids, Defaults.read(info.path))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            info.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        self._model = loaded.eval()
        self._scales = info.kv_scales or ((1.0, 1.0),) * info.num_layers if info.kv_dtype else None
        self._judged: dict[tuple[Any, ...], Output] = {}

    def judge(self, case: Case, got: list[Output]) -> list[Output]:
        """What is right at every position of the deployment's outputs, in their order: prompt by prompt."""
        found = []
        for index, output in enumerate(got):
            prompt = case.prompts[min(index // case.choices, len(case.prompts) - 1)]
            chosen = tuple(token for _, token in output.tokens)
            key = case.name, index, tuple(output.ids), chosen, len(output.prompt)
            if key not in self._judged:  # every case is asked more than once, and mostly answered alike
                self._judged[key] = self._judge(case, prompt, index % case.choices, output)
            found.append(self._judged[key])
        return found

    def _judge(self, case: Case, prompt: tuple[int, ...], choice: int, got: Output) -> Output:
        everything = [*prompt, *got.ids]
        rounding = nullcontext() if self._scales is None else rounded_kv(self._model, self._scales)
        with torch.inference_mode(), rounding:
            logits = self._model(torch.tensor([everything]), use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1)
        sampling = msgspec.structs.replace(self._sampling(case), choice=choice)
        constrained = any(name in case.sampling for name in _CONSTRAINED)
        tokens: list[Token] = []
        tops: list[dict[int, float]] = []
        for at, (_, chosen) in enumerate(got.tokens, len(prompt)):
            right = chosen if constrained else _draw(everything[:at], len(prompt), sampling, logits[at - 1])
            tokens.append((float(logprobs[at - 1, right]), right))
            best = logprobs[at - 1].topk(min(TOPS, logprobs.shape[-1]))
            tops.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        start = len(prompt) - len(got.prompt)
        judged: list[Token] = [
            (float(logprobs[at - 1, prompt[at]]) if at else None, prompt[at]) for at in range(start, len(prompt))
        ]
        return Output([token for _, token in tokens], tokens, tops, judged)

    def _sampling(self, case: Case) -> SamplingParams:
        given = {name: value for name, value in case.sampling.items() if name not in (*_CONSTRAINED, "n")}
        fields = msgspec.convert(given, NativeSampling)
        wishes = resolve(
            fields,
            self._limits,
            max_tokens=("max_new_tokens", fields.max_new_tokens),
            min_tokens=("min_new_tokens", fields.min_new_tokens),
        )
        return wishes.sampling


def _draw(tokens: list[int], prompt_len: int, sampling: SamplingParams, logits: torch.Tensor) -> int:
    """The token that follows `tokens`, given the model's logits [V] after them."""
    known = np.array(tokens, dtype=np.int32)
    request = Request(
        key=0,
        epoch=0,
        prompt_len=prompt_len,
        computed=0,
        tokens=Growing(known),
        blocks=Growing(known[:0]),
        sampling=sampling,
        choices=1,
        logprob_start=-1,
        prompt_top_logprobs=0,
    )
    with torch.inference_mode():
        return sample([request], logits[None].clone())[0].tokens[0]  # in place
