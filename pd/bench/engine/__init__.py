"""`pd bench engine`: what one GPU's scheduler and runner reach, beside what the GPU's own rates allow."""

from pd.bench.engine.command import add_arguments, run

__all__ = ["add_arguments", "run"]
