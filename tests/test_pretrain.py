import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

import pretrain
from pretrain import Config, Processes, parse_config

import torch

from conftest import ROOT, SMALL, Spy
from data import UserError
from model import GPT, GPTConfig

CPU = Processes(0, 1, torch.device("cpu"))
# two corpora, for a short evaluation; at this rate Adam does not magnify rounding errors
QUICK = {**SMALL, "mix": "toy-tinygsm,toy-omi1", "context": 64, "max_steps": 8, "init_std": 0.1,
         "learning_rate": 1e-3}


def settings(out_dir, data_dir, **changes) -> Config:
    return Config(**{**QUICK, "out_dir": str(out_dir), "data_dir": data_dir, **changes})


def rows_of(folder) -> list[dict]:
    """The metric rows but for what a clock decides."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    clock = "seconds", "tokens_per_second"
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def checkpoint(folder) -> dict:
    return torch.load(folder / "ckpt.pt", weights_only=True)


def tensors(file: Path) -> list[torch.Tensor]:
    """All in a checkpoint: of the networks, and where they are kept of their optimisers."""
    leaves = torch.utils._pytree.tree_leaves(torch.load(file, weights_only=True))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_same_run(left: Path, right: Path) -> None:
    """The same rows, samples and weights to the bit."""
    assert rows_of(left) == rows_of(right) and any(r.get("grad_norm") for r in rows_of(left))
    files = {file.name for file in left.iterdir()}
    assert files == {file.name for file in right.iterdir()}
    for file in files:
        if file.startswith("samples"):
            assert (left / file).read_bytes() == (right / file).read_bytes()
        if file.endswith(".pt"):
            ours, theirs = tensors(left / file), tensors(right / file)
            assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


# Processes are forked from a server that has imported torch: a start costs a tenth of a second.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_pretrain", "torch._dynamo"])


def enter(rank: int, world: int, port: int, folder: Path, work) -> None:
    """A child: rank `rank` of `world`, in a folder of its own, does work(rank)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    (folder / str(rank)).mkdir(parents=True, exist_ok=True)
    os.chdir(folder / str(rank))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    torch.set_num_threads(1)
    work(rank)


def run(folder: Path, work, world: int = 1) -> list[int]:
    """The exit statuses of `world` ranks that do `work` in folder/0, folder/1, ..."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=enter, args=(rank, world, port, folder, work))
             for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(900)  # one that hangs, which no load of the machine makes of another
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def pretraining(data_dir: str, accident=None, **changes):
    """Work for run(): the script itself, with an accident(rank) waiting to happen."""
    flags = {**QUICK, "out_dir": "run", "data_dir": data_dir, **changes}
    return partial(script, "pretrain", flags, accident)


def script(name: str, flags: dict, accident, rank: int) -> None:
    sys.argv = [f"{name}.py", *(f"--{key}={value}" for key, value in flags.items())]
    if accident:
        accident(rank)
    module = sys.modules[name]
    module.launch(module.main, module.Config, module.PRESETS)


def at(name: str, call: int, act, victim: int, rank: int) -> None:
    """An accident, but for its last argument: act() at the call-th call of a function, by name."""
    before, calls = pkgutil.resolve_name(name), itertools.count(1)

    def watched(*args, **kwargs):
        if next(calls) == call and rank == victim:
            act()
        return before(*args, **kwargs)

    mock.patch(name, watched).start()


def raise_signals(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


def killed_at_file_event(count: int, rank: int) -> None:
    """kill -9 at the count-th time that a file is opened, renamed, cut or deleted."""
    events = itertools.count(1)

    def watch(event, args):
        if event in ("open", "os.rename", "os.truncate", "os.remove") and "run/" in str(args[0]):
            if next(events) == count:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(watch)


def deaths(folder: Path, work_with, seed) -> int:
    """How often a run was killed, each time at a random moment, until it came to its end."""
    moments = random.Random(seed)
    for died in range(30):
        kill = partial(killed_at_file_event, moments.randint(1, 24))
        if run(folder, work_with(kill)) == [0]:
            return died
    raise AssertionError((folder / "0" / "stderr").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir) -> Path:
    """The folder of a run of 8 steps that nothing disturbed, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, pretraining(data_dir)) == [0]
    return folder / "0" / "run"


def test_flags_come_after_a_file_which_comes_after_a_preset_which_comes_after_the_class(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "150m", "layers": 3, "width": 24, "run": {"argv": []}}))
    argv = f"--config={file} --width=48 --batch_size 32 --learning_rate=0.5 --compile=true"
    cfg = parse_config(Config, pretrain.PRESETS, argv.split())
    assert (cfg.beta1, cfg.heads, cfg.layers, cfg.width) == (Config.beta1, 12, 3, 48)
    assert (cfg.batch_size, cfg.learning_rate, cfg.compile, cfg.tied) == (32, 0.5, True, False)


@pytest.mark.parametrize("flag, message", [
    ("--learing_rate=1", "did you mean --learning_rate"), ("batch=3", "mean --batch_size"),
    ("--batch_size=many", "--batch_size=many should be a whole number"),
    ("--batch_size", "a whole number"), ("--compile=maybe", "should be true, false"),
    ("--preset=150", "150m, 1b"), ("--config=none.json", "none.json")])
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_config(Config, pretrain.PRESETS, [flag])
    assert "\n" not in str(raised.value)


def test_no_setting_takes_a_number_that_makes_no_sense():
    """--learning_rate=inf was written to metrics.jsonl, --max_steps=-3 trained nothing."""
    numbers = [field.name for field in dataclasses.fields(Config) if field.type in (int, float)]
    senseless = [(name, x) for name in numbers for x in (float("nan"), float("inf"), -1)]
    senseless += dict(grad_clip=0, batch_size=0, beta1=1, init_std=0, warmup=1.0, eval_top_p=0.0,
                      min_learning_rate=1.1, seed=2**63, top_p=1.1, gae_lambda=2, eval_k=0).items()
    for name, x in senseless:
        with pytest.raises(UserError, match=f"^--{name}={x} must be "):
            pretrain.check_ranges(types.SimpleNamespace(**{name: x}))
    limits = dict(tokens=0, warmup_steps=0, weight_decay=0, max_steps=0, seed=0,
                  warmup=0, gae_lambda=1, kl_coef=0.0, top_p=1, eval_temperature=0, compile=False)
    pretrain.check_ranges(types.SimpleNamespace(**limits))


@pytest.mark.parametrize("flags, message", [
    (dict(learning_rate="nan"), "--learning_rate=nan must be above 0"), (dict(mix="no"), "unkn"),
    (dict(heads=3), "--width=32 must be a multiple of 2 x"), (dict(device="cuda"), "cuda: 0 GPUs"),
    (dict(max_steps=9), "another max_steps .8 there, 9 here.: choose another"),
    (dict(mix="toy-omi1:2,toy-omi2:50%"), "not both"), (dict(batch_size="x"), "a whole number")])
def test_a_mistake_is_one_sentence_of_one_rank_and_costs_no_file(
        whole, tmp_path, data_dir, flags, message):
    before = {file: file.read_bytes() for file in whole.iterdir()}
    assert run(tmp_path, pretraining(data_dir, out_dir=whole, **flags), world=2) == [2, 2]
    (said,), others = ((tmp_path / r / "stderr").read_text().splitlines() for r in "01")
    assert re.match(f"pretrain.py: .*{message}", said) and not others
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


@pytest.mark.parametrize("told, expected", [
    ({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "9"}, "9")])
def test_waiting_threads_soon_sleep_unless_the_user_says_how_they_wait(told, expected):
    """Set before torch is imported, which reads it then; beside other work spinning is slow."""
    code = ("import os, sys; sys.modules['torch'] = None\ntry: import pretrain\n"
            "except ImportError: print(os.environ.get('GOMP_SPINCOUNT'))")
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found = subprocess.check_output([sys.executable, "-c", code], env=clean | told, cwd=ROOT)
    assert found.decode().strip() == expected


@pytest.mark.parametrize("error, sentence", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--micro_batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--micro_batch"),
    (RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), "has died"),
    (BrokenPipeError(32, "Broken pipe"), "stopped"),
    (RuntimeError("Error(s) in loading state_dict for GPT:\n\tMissing key(s)"), "another model"),
    (KeyboardInterrupt(), "stopped"), (UserError("Ж is no → of cp1252"), "rl.py: ? is no ? of"),
    (RuntimeError("CUDA error: peer access is not supported"), None)])
def test_what_is_no_fault_of_the_code_is_one_sentence_and_nothing_else_is(
        monkeypatch, error, sentence):
    """A terminal that is not UTF-8 ended a training; "peer access" was taken for a dead rank."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["rl.py"])
    with pytest.raises(SystemExit if sentence else RuntimeError, match="2" if sentence else "peer"):
        pretrain.launch(mock.Mock(side_effect=error), Config, {})
    printed = sys.stderr.buffer.getvalue().decode("cp1252")
    assert (sentence or "") in printed and printed.count("\n") == bool(sentence)
    assert printed.startswith("rl.py: " if sentence else "")


@pytest.mark.parametrize("preset, shape, parameters", [
    ("150m", (768, 12, 12, False, 16), 190_440_960),
    ("1b", (2048, 16, 16, True, 8), 1_176_668_160)])
def test_the_paper_s_presets_have_its_settings(whole, preset, shape, parameters):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--preset={preset}"])
    assert (cfg.width, cfg.layers, cfg.heads, cfg.tied, cfg.micro_batch_size) == shape
    assert (cfg.context, cfg.batch_size, cfg.rope_base, cfg.init_std) == (2048, 512, 1e4, 0.02)
    assert (cfg.learning_rate, cfg.min_learning_rate, cfg.warmup_steps) == (1e-3, 0.1, 5000)
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    with torch.device("meta"):
        model = pretrain.build_model(cfg, 50_257, "meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    (group,) = checkpoint(whole)["optimizer"]["param_groups"]  # of all weights: everything decays
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.99))


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.5])
def test_the_learning_rate_is_above_zero_at_the_first_step_and_ends_at_its_floor(warmup):
    rates = [pretrain.schedule((step + 1) / 100, warmup, 0.1) for step in range(100)]
    assert rates[0] > 0 and max(rates) <= 1 and rates[-1] == pytest.approx(0.1)
    assert pretrain.schedule(0.7, warmup, 1.0) == 1.0


def trained(micro_batch_size: int, processes=CPU):
    """Weights after a step of descent, and what a spy has seen."""
    torch.manual_seed(0)
    shape = dict(vocab_size=30, context=16, width=16, layers=1, heads=2, init_std=0.2)
    model = GPT(GPTConfig(**shape)).double()
    blocks, spy = torch.randint(30, (6, 17)), Spy()
    blocks[4] = -1  # the padding of a last batch: were micro-batches averaged, splits would differ
    mine, optimizer = blocks[processes.rank :: processes.world], torch.optim.SGD(model.parameters())
    loss = lambda part: pretrain.next_token_loss(model, part) / 80
    plain = pretrain.autocast("float32", CPU.device)
    with spy:
        pretrain.update(optimizer, mine.split(micro_batch_size), loss, 1.0, 1e9, plain)
    return list(model.parameters()), spy.names


def save_trained(rank: int) -> None:
    processes = pretrain.setup_distributed("cpu")
    torch.save([trained(micro, processes)[0] for micro in (1, 2, 4)], "weights.pt")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_gradient_is_the_same_for_every_split_into_ranks_and_micro_batches(tmp_path, world):
    """A mean of means weighs short parts too much (transformers#34191, #34242)."""
    assert run(tmp_path, save_trained, world) == [0] * world
    pretrain.setup_distributed("cpu")
    whole = trained(6)[0]
    for rank in range(world):  # ranks with 6 rows; with 3 and 3; with 2, 2, 1 and 1
        for found in torch.load(tmp_path / str(rank) / "weights.pt"):
            torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-12)


def test_a_training_step_waits_for_no_device():
    """A .item() would idle a GPU until the host answers."""
    pretrain.setup_distributed("cpu")
    _, names = trained(2)
    assert "mm" in names and not names & {"_local_scalar_dense", "nonzero"}


def test_a_step_goes_as_far_as_the_clipped_gradient_and_the_norm_is_that_before():
    pretrain.setup_distributed("cpu")
    weight, slope = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 4.0])
    loss, plain = lambda part: part * (weight @ slope + 1), pretrain.autocast("float32", CPU.device)
    found = pretrain.update(torch.optim.SGD([weight]), [0.5, 0.5], loss, 0.1, 2.0, plain)
    torch.testing.assert_close([*map(float, found), *weight.tolist()], [1.0, 5.0, -0.12, -0.16])


def test_no_thread_of_the_process_group_outlives_it():
    """An optimiser imports torch.distributed.nn, whose functions then hold the group for good: one
    run in fifty ended with "terminate called without an active exception", status 134."""
    script = """import gc, weakref, pretrain, torch, torch.distributed as dist
pretrain.setup_distributed("cpu")
weight = torch.ones(1, requires_grad=True)
weight.sum().backward()
torch.optim.AdamW([weight], fused=True).step()
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert gc.collect() >= 0 and group() is None"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_run_folder_holds_what_the_design_promises(whole, data_dir, capsys):
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    assert files.keys() == {"config.json", "metrics.jsonl", "mixture.json", "ckpt.pt"}
    where = json.loads(files["config.json"])["run"]
    assert where.keys() == {"argv", "torch_version", "device", "world_size", "inputs"}
    assert parse_config(Config, {}, [f"--config={whole}/config.json"]).max_steps == 8
    found, shares = rows_of(whole), json.loads(files["mixture.json"]).values()
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[-1]["kind"] == "eval" and found[-1]["loss"]["toy-omi1"] < found[0]["loss"]
    assert sum(corpus["share"] for corpus in shares) == pytest.approx(1)
    starts = [pretrain.load_model(path, "cpu") for path in (whole, whole / "ckpt.pt")]  # as rl.py
    last, same = (pretrain.fingerprint(model) for model, _ in starts)
    assert {tokenizer for _, tokenizer in starts} == {"toy"} and last == same
    with pytest.raises(UserError, match="cannot be read"):  # as of step_NNNNNN.pt in its place
        pretrain.load_checkpoint(whole / "ckpt.pt", "critic")
    assert pretrain.main(settings(whole, data_dir))["step"] == 8  # a finished run only says so
    assert "is finished" in capsys.readouterr().out and rows_of(whole) == found


def test_a_folder_and_the_signals_are_a_run_s_until_it_ends_however(
        tmp_path, data_dir, monkeypatch):
    """Two runs mixed their rows in one metrics.jsonl; a notebook's worker is ended by SIGTERM."""
    cfg = settings(tmp_path, data_dir, overwrite=True, max_steps=1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pretrain.Run(cfg, pretrain.setup_distributed("cpu"), 1, {"a": 1}):
        with pytest.raises(UserError, match="another process works in"):
            pretrain.main(cfg)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError) as kept:
        patched.setattr(pretrain, "update", mock.Mock(side_effect=ZeroDivisionError))
        pretrain.main(cfg)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert pretrain.main(cfg)["step"] == 1 and kept  # a traceback that is kept holds no lock


@pytest.mark.parametrize("name, part, new, message", [
    ("config.json", b".+", b"", "not of a run"), ("config.json", b".+", None, "not of a run"),
    ("config.json", b".{20}$", b"", "be read"), ("config.json", b".+", b"[1]", "be read"),
    ("config.json", b".+", b'{"model_type": "llama"}', "not of a run like this"),
    ("config.json", b".+", b'{"run": "llama"}', "not of a run like this"),
    ("config.json", b'(omi1": ")', rb"\1new", "another content of toy-omi1 .new.* there"),
    ("metrics.jsonl", b".+", None, "is cut"), ("ckpt.pt", b".+", b"no", "cannot be read"),
    ("metrics.jsonl", b".$", b"", "is cut")])
def test_what_a_run_cannot_go_on_from_is_a_sentence_and_only_a_run_is_cleared(
        whole, tmp_path, data_dir, name, part, new, message):
    """NUL bytes behind a deleted metrics.jsonl, tracebacks, tokens told apart by name alone."""
    folder, link = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "link"
    link.symlink_to(folder)
    content, other = (folder / name).read_bytes(), folder / "step_000003.pt"
    other.write_bytes(b"of a run")
    (folder / name).unlink()
    if new is not None:
        (folder / name).write_bytes(re.sub(part, new, content, count=1, flags=re.DOTALL))
    with pytest.raises(UserError, match=message) as raised:
        pretrain.main(settings(link, data_dir))
    afresh = settings(link, data_dir, overwrite=True, max_steps=1)
    if name != "config.json" or "--overwrite=true" in str(raised.value):
        assert pretrain.main(afresh)["step"] == len(rows_of(folder)) - 1 == 1 and not other.exists()
    else:
        with pytest.raises(UserError, match=message):
            pretrain.main(afresh)
        assert other.exists()


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(
        tmp_path, data_dir, whole):
    """kill -9 before a random touch of a file: of a row, a checkpoint, a rename, a clean-up."""
    assert deaths(tmp_path, partial(pretraining, data_dir), seed=0) > 3
    assert_same_run(tmp_path / "0" / "run", whole)


@pytest.mark.parametrize("method, call, numbers, ends, step", [
    ("batch", 5, [signal.SIGINT], [0], 5), ("batch", 5, [signal.SIGTERM], [0, 0], 5),
    ("batch", 5, [signal.SIGINT] * 2, [0], 5), ("held_out", 1, [signal.SIGTERM], [0], 6),
    ("batch", 6, [signal.SIGKILL], [2, -signal.SIGKILL], 3)])
def test_a_signal_to_one_rank_stops_all_and_the_run_continues_as_one_left_alone(
        tmp_path, data_dir, whole, method, call, numbers, ends, step):
    """torchrun may forward a Ctrl-C that the terminal has sent already: two are one. In an
    evaluation a signal was forgotten until all corpora were done; it is made up for. A smaller
    --micro_batch_size was advised when memory ran out, and then refused."""
    signals, victim = partial(raise_signals, *numbers), len(ends) - 1
    signalled = partial(at, f"pretrain.Mixture.{method}", call, signals, victim)
    folder = tmp_path / "0" / "run"
    assert run(tmp_path, pretraining(data_dir, signalled), len(ends)) == ends
    said = "".join((tmp_path / "0" / name).read_text() for name in ("stdout", "stderr"))
    died = "pretrain.py: another process of this run has died"
    assert (died if any(ends) else f"stopped at step {step}: the same") in said
    assert checkpoint(folder)["step"] == step
    assert any(ends) or rows_of(folder)[-1]["kind"] == "train"
    # the ranks have working folders of their own: what rank 1 wrote would be in its own
    assert {p.name for p in tmp_path.glob("1/*")} <= {"stdout", "stderr"}
    world, micro_batch_size = ends.count(0) or 1, 1 if any(ends) else 4
    again = pretraining(data_dir, out_dir=folder, micro_batch_size=micro_batch_size)
    assert run(tmp_path, again, world) == [0] * world
    if len(ends) == 1:
        return assert_same_run(folder, whole)
    found = [(checkpoint(path)["model"], [(row["step"], row["loss"]) for row in rows_of(path)])
             for path in (folder, whole)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("log_every, save_every, kept", [(1, 3, 3), (100, 2, 4)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
        tmp_path, data_dir, monkeypatch, log_every, save_every, kept):
    diverging = lambda progress, *_: float("nan") if progress == 5 / 8 else 1.0
    monkeypatch.setattr(pretrain, "schedule", diverging)
    every = dict(log_every=log_every, save_every=save_every, eval_every=100)
    with pytest.raises(UserError, match="not all numbers are finite.*another --out_dir"):
        pretrain.main(settings(tmp_path, data_dir, **every))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    state = checkpoint(tmp_path)
    assert state["step"] == kept and all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize("size, file", [(20_000, "ckpt.pt"), (300, "metrics.jsonl")])
def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, data_dir, size, file):
    resource = pytest.importorskip("resource")  # not on Windows
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    filled = partial(at, "pretrain.Mixture.batch", 5, full, 0)
    assert run(tmp_path, pretraining(data_dir, filled)) == [2]
    printed = (tmp_path / "0" / "stderr").read_text()
    assert printed.startswith(f"pretrain.py: run/{file} could not be written")
    assert len(printed.splitlines()) == 1 and "mend that and start again" in printed
    folder = tmp_path / "0" / "run"
    assert checkpoint(folder)["step"] == 3 and not list(folder.glob("*.tmp"))


def test_a_pipe_that_closes_stops_a_run_as_a_signal_does(tmp_path, data_dir, whole):
    """At Ctrl-C `| tee log` ends first; what was behind the last checkpoint was lost."""
    close = partial(exec, "import os; r, w = os.pipe(); os.close(r), os.dup2(w, 1)")
    closed = partial(at, "pretrain.Mixture.batch", 5, close, 0)
    assert run(tmp_path, pretraining(data_dir, closed, log_every=1)) == [0]
    assert checkpoint(tmp_path / "0" / "run")["step"] == 6
    assert run(tmp_path, pretraining(data_dir)) == [0]
    assert_same_run(tmp_path / "0" / "run", whole)


def bare_system(rank: int) -> None:
    sys.modules |= {"fcntl": None, "resource": None}
    os.environ["PATH"] = ""  # no git
    del os.fork, os.sched_getaffinity
    pretrain.ctypes.CDLL = mock.Mock(side_effect=OSError)
    broken = mock.Mock(side_effect=RuntimeError("no C++ compiler\na long story"))
    torch.compile = mock.Mock(return_value=broken)


def test_what_a_system_lacks_is_done_without(tmp_path, data_dir, whole):
    """No script started on Windows, or where there is no git, or no compiler for --compile."""
    assert run(tmp_path, pretraining(data_dir, bare_system, compile=True)) == [0]
    assert "which fails here (no C++ compiler)\n" in (tmp_path / "0" / "stdout").read_text()
    assert_same_run(tmp_path / "0" / "run", whole)


def test_settings_carry_over_from_width_to_width(tmp_path, data_dir):
    """Init and rate go by the rule that PRESETS state; at equal steps a wider model is better."""
    losses, tiny = [], parse_config(Config, pretrain.PRESETS, [])
    for preset in ("narrow", "tiny", "wide"):
        flags = dict(preset=preset, mix="toy-tinygsm", max_steps=40, eval_every=40, batch_size=2,
                     data_dir=data_dir, out_dir=tmp_path / preset)
        cfg = parse_config(Config, pretrain.PRESETS, [f"--{k}={v}" for k, v in flags.items()])
        assert cfg.width / cfg.heads == tiny.width / tiny.heads
        assert cfg.init_std * cfg.width**0.5 == pytest.approx(tiny.init_std * tiny.width**0.5, 0.02)
        assert cfg.learning_rate == min(1, tiny.width / cfg.width) * tiny.learning_rate
        losses.append(pretrain.main(cfg)["loss"]["toy-tinygsm"])
    assert losses[0] > losses[1] + 0.2 and losses[1] > losses[2] + 0.05
