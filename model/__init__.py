"""pix2pix on a dataset version: networks, data, losses, training, evaluation. Imports `ixi_etl`, and no Prefect."""

import os

SPIN_COUNT = "30000"
"""How often a thread of libgomp looks for its next work before it sleeps; libgomp's own default is 300,000.

Waiting threads that spin take the cores from those that compute, which costs a step ten times its duration on a busy
machine. With this count an idle machine is as fast as with the default (docs/performance.md has the measures).
"""


def limit_spinning() -> None:
    """Set `GOMP_SPINCOUNT`, unless the environment says how OpenMP threads wait.

    libgomp, which PyTorch's wheels for Linux bring, reads it once, when torch is first imported: so this runs on the
    import of this package, before any of its modules import torch. Other OpenMP libraries ignore it.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


limit_spinning()
