"""NaViT in JAX. Nothing is imported here, so that a module which needs no model never pays for loading flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit_jax.predict import Model


def load(path: str, **options: Any) -> "Model":
    """A model to call, from a run's folder, a checkpoint, another library's file or a hub name: `embed`, `classify`...

    options: of `predict.Model`, such as tokenizer=PATH. Raises UserError for what cannot be read.
    """
    from navit_jax.predict.load import load as load_model

    return load_model(path, **options)
