"""The presets of a training as a closed list, for the command line and the server's page.

`model.config.PRESETS` has their settings, and needs torch.
"""

from typing import Literal

Preset = Literal["paper", "digits", "smoke", "gpu"]
