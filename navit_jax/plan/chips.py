"""The machines that can be planned, one entry a TPU generation, from the maker's data sheets.

Peak FLOP/s are `metrics.PEAKS`. Sheets give a chip's interconnect in both directions over all of its links; here it is
one link in one direction, because how many links a collective can use depends on where its chips lie.
"""

from dataclasses import dataclass

from navit_jax.metrics import PEAKS

GIB = 2**30
HOP_SECONDS = 1e-6  # from chip to chip; "about 1 us a hop" of jax-ml.github.io/scaling-book, not a data sheet's


@dataclass(frozen=True)
class Chip:
    """One chip, which is one jax device. All in bytes, FLOP/s or bytes/s.

    kind: as in `metrics.PEAKS`. hbm: memory that a program can use, as the compiler states it; of the sheet's, it keeps
    some. clock: cycles a second. link: one interconnect link, one direction. axes: of the torus, two links each. ring:
    an axis this long, or a multiple, is closed to a ring in a slice; along others, data turns round at the ends.
    """

    kind: str
    hbm: float
    hbm_bandwidth: float
    clock: float
    link: float
    axes: int
    ring: int
    sheet: str

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAKS[self.kind] * 1e12


# Read in November 2026. Sheets: HBM 16 GB, 800 GiB/s, 400 GB/s over 4 ports (v5e); 32 GB, 1638 GB/s, 800 GB/s over 4
# ports (v6e); 95 GB, 2765 GB/s, 1200 GB/s over 6 (v5p); 32 GiB, 1200 GB/s, 6 links of 50 GB/s (v4; links and clock:
# arXiv 2304.01433). An axis is closed at 16 chips (v5e, v6e), at multiples of 4 in whole cubes (v4, v5p). The other
# clocks are on no sheet: at these, v5e and v5p reach their peaks with 4 units of 128 x 128 a core; v6e's is a guess at
# which the compiler's cycles for a product of 4096 mean 87 % of the peak (97 % on v5e).
CHIPS = {
    "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 1.5e9, 50e9, 2, 16, "docs.cloud.google.com/tpu/docs/v5e"),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1638e9, 1.75e9, 100e9, 2, 16, "docs.cloud.google.com/tpu/docs/v6e"),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 2765e9, 1.75e9, 100e9, 3, 4, "docs.cloud.google.com/tpu/docs/v5p"),
    "v4": Chip("TPU v4", 30.75 * GIB, 1200e9, 1.05e9, 50e9, 3, 4, "docs.cloud.google.com/tpu/docs/v4"),
}
