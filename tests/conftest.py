"""Tests import the flat scripts from the repository's root, from whatever folder pytest is started."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # the networks here are tiny; a second thread costs more than it brings on a busy machine


@pytest.fixture
def run_folder(tmp_path):
    """What a search leaves behind: a function with a learned scalar, clipped at 5."""
    folder = tmp_path / 'runs/toy-teacher-seed0'
    folder.mkdir(parents=True)
    (folder / 'activation.json').write_text(json.dumps(
        {'expression': 'mul(x, scale(relu(x), 0.5))', 'clip': 5.0, 'model': 'toy', 'data': 'teacher', 'seed': 0}))
    return folder
