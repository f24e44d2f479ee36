"""The trainer half of OSD: the only package that touches TRL's trainer internals."""

import osd  # noqa: F401 - first: it silences a warning of TRL's import
from osd.train._compat import check_trl, restore_numbered_cpus

check_trl()  # before TRL is imported: an unsupported version then gets a readable error
restore_numbered_cpus()

from osd.train.config import OSDConfig  # noqa: E402
from osd.train.trainer import OSDTrainer  # noqa: E402

__all__ = ["OSDConfig", "OSDTrainer"]
