"""The models that ship with pd, registered like any plugin's."""

from __future__ import annotations

from pd import hookimpl
from pd.hookspecs import RegisterModel


@hookimpl
def pd_register_models(register: RegisterModel) -> None:
    register("LlamaForCausalLM", "pd.models.llama:build")
    register("Qwen2ForCausalLM", "pd.models.llama:build")
