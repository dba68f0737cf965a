"""pix2pix on a published dataset version: train, evaluate, synthesise volumes, export. Imports no Prefect.

Public functions, in the order in which a run uses them:

- `model.config.preset`, `model.config.TrainConfig`: the configuration of a training run.
- `model.jobs.prepare_run`, `train_run`, `evaluate_run`: whole jobs on a data root, as the command line runs them.
- `model.train.train`: the training loop. `model.trainer.Trainer`: networks, optimisers and one step.
- `model.data.load_pairs`: one split of a version in memory.
- `model.run.open_run`: a run that was trained before.
- `model.generator.load_generator`, `as_predictor`: a trained generator, and its use on slices.
- `model.synthesize.load_trained`, `synthesize_volume`: a generator with what it needs to know, and its use on volumes.
- `model.volumes.synthesize_file`, `synthesize`: the same on NIfTI files.
- `model.export.export`: the generator as safetensors or ONNX.
- `model.report.write_report`: the report page of a run.
"""

import os

SPIN_COUNT = "3000"
"""How many times a waiting thread of libgomp polls for work before it sleeps; libgomp's own default is 300,000.

Waiting threads that spin take CPU time from threads that compute, which doubles the time of a step on a busy machine.
With this count an idle machine is as fast as with the default (docs/training.md has the measurements).
"""

_USER_SETTINGS = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})


def limit_spinning() -> None:
    """Set `GOMP_SPINCOUNT`, unless the environment already defines how OpenMP threads wait.

    libgomp, which PyTorch's Linux wheels bundle, reads the variable once, when torch is first imported. This package
    therefore sets it on import, before any of its modules import torch. Other OpenMP libraries ignore it.
    """
    if not os.environ.keys() & _USER_SETTINGS:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


limit_spinning()
