"""Tests import the flat scripts from the repository's root, from whatever folder pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
