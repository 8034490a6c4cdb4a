"""Fixtures: a base model that is trained in seconds, and the real data where a checkout has it."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from a second

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402

SMALL = dict(layers=2, width=32, heads=2, batch_size=4, micro_batch_size=4, eval_every=6,
             save_every=3, log_every=1)


class Spy(TorchDispatchMode):
    """Notes the names of operations ("nonzero" also for indexing by a mask, which runs it), and
    the shapes of their results.
    """

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **kwargs or {})
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.names.add("nonzero")
        self.names.add(name)
        if isinstance(result, torch.Tensor):
            self.shapes.add(result.shape)
        return result


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """Where the token files of the embedded corpora are made, once."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def base(tmp_path_factory, data_dir) -> str:
    """The folder of a pretraining run of a few steps."""
    folder = str(tmp_path_factory.mktemp("runs") / "base")
    run = dict(out_dir=folder, data_dir=data_dir, max_steps=6, init_std=0.1)
    pretrain.main(pretrain.Config(**run, **SMALL))
    return folder


def make_gpt(seed=3, layers=2) -> GPT:
    """A random model of 50 tokens, with weights large enough that its choices differ."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, context=64, width=32, layers=layers, heads=2, init_std=0.3))


@pytest.fixture
def gpt() -> GPT:
    return make_gpt(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real question sets and the GPT-2 vocabulary, beside some checkouts."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real question sets are not beside this checkout")
    return folder
