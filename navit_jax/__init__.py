"""NaViT in JAX. Nothing is imported here, so that a module which needs no model never pays for loading flax."""
