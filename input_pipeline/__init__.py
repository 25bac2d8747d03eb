"""Images in, packed rows out: numpy only, no jax (grain, which imports jax, is touched by `loader` alone)."""
