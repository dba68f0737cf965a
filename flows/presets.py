"""The presets of a training run as a closed list, for the command line and the parameter form of the server.

Their settings are in `model.config.PRESETS`.
"""

from typing import Literal

Preset = Literal["paper", "digits", "smoke", "gpu", "moschetto"]
