"""What every test relies on: no network, one torch thread, quiet bars."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from loratools.verbs.demo import Demo

# Set before transformers or huggingface_hub are imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Torch at one thread wherever a test has loaded it: steady results, and no fight over two processors."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demonstration's model and adapter, for tests that read and do not write."""
    from loratools.verbs.demo import build_demo

    return build_demo(tmp_path_factory.mktemp("demo"))
