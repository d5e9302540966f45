"""A plugin for hooks that pd does not have."""

from typing import Any

from pd import hookimpl


@hookimpl
def pd_register_schedulers(register: Any) -> None:
    register("mine")
