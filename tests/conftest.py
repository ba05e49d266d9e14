"""Tests import the flat scripts from the repository's root, from whatever folder pytest is started."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # the networks here are tiny: a second thread costs more than it brings
