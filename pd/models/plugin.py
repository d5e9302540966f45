"""The models that ship with pd, registered like any plugin's."""

from __future__ import annotations

from pd import hookimpl
from pd.hookspecs import RegisterModel
from pd.models.dense import DENSE_ARCHITECTURES


@hookimpl
def pd_register_models(register: RegisterModel) -> None:
    for architecture in sorted(DENSE_ARCHITECTURES):
        register(architecture, "pd.models.llama:build")
