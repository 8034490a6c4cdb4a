import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pretrain
from pretrain import Config, Processes, parse_config

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, SMALL
from data import UserError
from model import GPT, GPTConfig

CPU = Processes(0, 1, torch.device("cpu"))
NO_CAST = torch.autocast("cpu", enabled=False)
# two corpora, for a short evaluation; at this rate Adam does not magnify rounding errors
QUICK = {**SMALL, "mix": "toy-tinygsm,toy-omi1", "context": 64, "max_steps": 8, "init_std": 0.1,
         "learning_rate": 1e-3}


def settings(out_dir, data_dir, **changes) -> Config:
    return Config(**{**QUICK, "out_dir": str(out_dir), "data_dir": data_dir, **changes})


def rows(folder) -> list[dict]:
    """The metric rows but for what a clock decides."""
    found = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found]


def checkpoint(folder) -> dict:
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


def assert_same_run(left, right, **tolerance) -> None:
    """The same weights and the same rows, to the bit or within a tolerance."""
    states = [checkpoint(folder)["model"] for folder in (left, right)]
    torch.testing.assert_close(*states, **tolerance or dict(atol=0, rtol=0))
    for ours, theirs in zip(rows(left), rows(right), strict=True):
        loss = pytest.approx(theirs["loss"], rel=1e-5 if tolerance else 0, abs=0)
        assert (ours["step"], ours["kind"], ours["loss"]) == (theirs["step"], theirs["kind"], loss)


# ---------------------------------------------------------------- processes
#
# Forked from a server that has imported torch (its optimisers import dynamo): a start costs a
# tenth of a second, not several.

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
    values = {**QUICK, "out_dir": "run", "data_dir": data_dir, **changes}
    return functools.partial(script, [f"--{k}={v}" for k, v in values.items()], accident)


def script(argv: list[str], accident, rank: int) -> None:
    sys.argv = ["pretrain.py", *argv]
    if accident:
        accident(rank)
    pretrain.launch(pretrain.main, Config, pretrain.PRESETS)


def before_batch(step: int, act) -> None:
    """Calls act() when the batch of a step is fetched: after `step` updates."""
    batch = pretrain.Mixture.batch

    def watched(self, wanted):
        if wanted == step:
            act()
        return batch(self, wanted)

    pretrain.Mixture.batch = watched


def signalled_at_batch(step: int, numbers: list[int], victim: int, rank: int) -> None:
    """Rank `victim` gets signals while a step's batch is fetched."""
    if rank == victim:
        before_batch(step, lambda: [os.kill(os.getpid(), number) for number in numbers])


def killed_at_file_event(count: int, rank: int) -> None:
    """kill -9 at the count-th time that a file is opened, renamed, cut or deleted."""
    events = itertools.count(1)

    def watch(event, args):
        if event in ("open", "os.rename", "os.truncate", "os.remove") and "run/" in str(args[0]):
            if next(events) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, base) -> Path:
    """The folder of a run of 8 steps that nothing disturbed, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, pretraining(data_dir)) == [0]
    return folder / "0" / "run"


# ---------------------------------------------------------------- arguments


def test_flags_come_after_a_file_which_comes_after_a_preset_which_comes_after_the_class(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "150m", "layers": 3, "width": 24, "run": {"argv": []}}))
    argv = f"--config={file} --width=48 --batch_size 32 --learning_rate=0.5 --compile=true"
    cfg = parse_config(Config, pretrain.PRESETS, argv.split())
    assert (cfg.beta1, cfg.heads, cfg.layers, cfg.width) == (Config.beta1, 12, 3, 48)
    assert (cfg.batch_size, cfg.learning_rate, cfg.compile, cfg.tied) == (32, 0.5, True, False)


@pytest.mark.parametrize("argv, message", [
    (["--learing_rate=1"], "did you mean --learning_rate"), (["batch=3"], "mean --batch_size"),
    (["--batch_size=many"], "--batch_size=many should be a whole number"),
    (["--batch_size"], "a whole number"), (["--compile=maybe"], "should be true, false"),
    (["--dtype=float3"], "should be auto, float32, bfloat16"), (["--preset=150"], "150m, 1b"),
    (["--device=tpu"], "should be auto, cpu, cuda"), (["--config=none.json"], "none.json")])
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_config(Config, pretrain.PRESETS, argv)
    assert "\n" not in str(raised.value)


def test_help_prints_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_config(Config, pretrain.PRESETS, ["--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert len(re.findall(rf"^    {field.name}: .*  # ", printed, re.MULTILINE)) == 1


NUMBERS = [field.name for field in dataclasses.fields(Config) if field.type in (int, float)]
SENSELESS = [{name: x} for name in NUMBERS for x in (float("nan"), float("inf"), -1)] + [
    dict(grad_clip=0), dict(batch_size=0), dict(beta1=1), dict(init_std=0), dict(warmup=1.0),
    dict(min_learning_rate=1.1), dict(top_p=0.0), dict(eval_top_p=1.1), dict(gae_lambda=1.01)]
NONE = dict(tokens=0, warmup_steps=0, weight_decay=0, max_steps=0, keep_every=0, seed=0, top_p=1,
            warmup=0, gae_lambda=1, kl_coef=0.0, eval_k=0, eval_temperature=0, compile=False)


@pytest.mark.parametrize("setting", [NONE, *SENSELESS], ids=str)
def test_no_setting_takes_a_number_that_makes_no_sense(setting):
    """--learning_rate=inf was written to metrics.jsonl, --max_steps=-3 trained nothing."""
    refused = contextlib.nullcontext()
    if setting is not NONE:
        refused = pytest.raises(UserError, match="^--{}={} must be ".format(
            *next(iter(setting.items()))))
    with refused:
        pretrain.check_ranges(types.SimpleNamespace(**setting))


@pytest.mark.parametrize("change, message", [
    (dict(learning_rate=float("nan")), "--learning_rate=nan must be above 0"),
    (dict(heads=3), "multiple of 2 x --heads=3"), (dict(mix="toy-tiny"), "unknown corpus"),
    (dict(mix="toy-omi1:2,toy-omi2:50%"), "not both"), (dict(device="cuda"), "cuda: 0 GPUs"),
    (dict(max_steps=9), "holds a run with another max_steps .8 there, 9 here.: choose another")])
def test_a_mistake_is_a_sentence_and_costs_no_file(whole, data_dir, change, message):
    before = {file: file.read_bytes() for file in whole.iterdir()}
    with pytest.raises(UserError, match=message):
        pretrain.main(settings(whole, data_dir, **change))
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


@pytest.mark.parametrize("argv", [["--batch_size=x"], ["--mix=nothing", "--out_dir=unused"]])
def test_a_mistake_prints_one_line_and_exits_with_2(argv, tmp_path):
    assert run(tmp_path, functools.partial(script, argv, None), world=2) == [2, 2]
    printed = [(tmp_path / rank / "stderr").read_text() for rank in "01"]
    assert printed[0].startswith("pretrain.py: ") and len(printed[0].splitlines()) == 1
    assert printed[1] == "" and not (tmp_path / "0" / "unused").exists()


def test_waiting_threads_sleep_unless_the_user_says_how_they_wait():
    """Set before torch is imported, which reads it then; beside other work spinning is slow."""
    code = ("import os, sys; sys.modules['torch'] = None\ntry: import pretrain\n"
            "except ImportError: print(os.environ.get('OMP_WAIT_POLICY'))")
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for told, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
                           ({"GOMP_SPINCOUNT": "9"}, "None")):
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=clean | told, cwd=ROOT, capture_output=True, text=True)
        assert found.stdout.strip() == expected


def failing(error):
    def main(*arguments):
        raise error

    return main


def launched(monkeypatch, error) -> str:
    """What launch prints on the stderr of a terminal that is not UTF-8, when main raises error."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["rl.py"])
    with pytest.raises(SystemExit, match="2"):
        pretrain.launch(failing(error), Config, {})
    return sys.stderr.buffer.getvalue().decode("cp1252")


@pytest.mark.parametrize("error, sentence", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--micro_batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--micro_batch"),
    (RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), "has died"),
    (KeyboardInterrupt(), "stopped"), (UserError("Ж is no → of cp1252"), "rl.py: ? is no ? of")])
def test_what_is_no_fault_of_the_code_is_one_sentence(monkeypatch, error, sentence):
    """A terminal that is not UTF-8 ended a training that was done with a UnicodeEncodeError."""
    printed = launched(monkeypatch, error)
    assert sentence in printed and printed.startswith("rl.py: ") and printed.count("\n") == 1


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch):
    """"CUDA error: peer access is not supported" was taken for a rank that had died."""
    with pytest.raises(RuntimeError, match="peer access"):
        launched(monkeypatch, RuntimeError("CUDA error: peer access is not supported"))


# ---------------------------------------------------------------- model and step


def test_the_paper_s_presets_have_its_settings(whole):
    for preset, shape in (("150m", (768, 12, 12, False, 16)), ("1b", (2048, 16, 16, True, 8))):
        cfg = parse_config(Config, pretrain.PRESETS, [f"--preset={preset}"])
        assert (cfg.width, cfg.layers, cfg.heads, cfg.tied, cfg.micro_batch_size) == shape
        assert (cfg.context, cfg.batch_size, cfg.rope_base, cfg.init_std) == (2048, 512, 1e4, 0.02)
        assert (cfg.learning_rate, cfg.min_learning_rate, cfg.warmup_steps) == (1e-3, 0.1, 5000)
        assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    (group,) = checkpoint(whole)["optimizer"]["param_groups"]  # of all weights: everything decays
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.9, 0.99), 1e-8)


@pytest.mark.parametrize("preset, vocab_size, total", [
    ("tiny", 836, 375_168), ("20m", 50_257, 21_254_400), ("60m", 50_257, 59_286_016),
    ("150m", 50_257, 190_440_960), ("150m", 32_000, 162_398_208), ("1b", 32_000, 1_139_277_824)])
def test_a_preset_has_the_parameters_of_its_formula(preset, vocab_size, total):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--preset={preset}"])
    with torch.device("meta"):
        model = pretrain.build_model(cfg, vocab_size, torch.device("meta"))
    C, ends = cfg.width, 1 if cfg.tied else 2
    assert sum(p.numel() for p in model.parameters()) == total
    assert total == ends * vocab_size * C + cfg.layers * (4 + 3 * 4) * C * C


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.5])
def test_the_learning_rate_is_above_zero_at_the_first_step_and_ends_at_its_floor(warmup):
    rates = [pretrain.schedule((step + 1) / 100, warmup, 0.1) for step in range(100)]
    assert rates[0] > 0 and max(rates) <= 1 and rates[-1] == pytest.approx(0.1)
    assert pretrain.schedule(0.7, warmup, 1.0) == 1.0


def trained(micro_batch_size: int, processes=CPU, steps=1, within=contextlib.nullcontext()):
    """A model's weights after steps of gradient descent; where its gradients were in the last."""
    torch.manual_seed(0)
    shape = dict(vocab_size=30, context=16, width=16, layers=1, heads=2, init_std=0.2)
    ddp = DistributedDataParallel(GPT(GPTConfig(**shape)).double(), gradient_as_bucket_view=True)
    blocks, places = torch.randint(30, (6, 17)), []
    blocks[4] = -1  # the padding of a last batch: were micro-batches averaged, splits would differ
    mine, optimizer = blocks[processes.rank :: processes.world], torch.optim.SGD(ddp.parameters())
    cfg = Config(micro_batch_size=micro_batch_size, grad_clip=1e9)
    for p in ddp.parameters():
        p.register_post_accumulate_grad_hook(lambda p: places.append(p.grad.data_ptr()))
    for _ in range(steps):
        places.clear()
        with within:
            pretrain.train_step(ddp, optimizer, mine, 80, 1.0, cfg, NO_CAST, processes)
    return list(ddp.parameters()), places


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_gradient_is_the_same_for_every_way_to_split_a_batch(micro_batch_size):
    """The mean of the micro-batches' means weighs short ones too much (transformers#34191)."""
    pretrain.setup_distributed("cpu")
    exact = dict(atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(trained(micro_batch_size)[0], trained(6)[0], **exact)


def save_trained(rank: int) -> None:
    torch.save(trained(1, pretrain.setup_distributed("cpu"))[0], "weights.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradient_of_several_ranks_is_that_of_one(tmp_path, world):
    """The mean over ranks of their means weighs them wrongly (transformers#34242)."""
    assert run(tmp_path, save_trained, world) == [0] * world
    pretrain.setup_distributed("cpu")
    for rank in range(world):  # ranks with 3 and 3 rows; with 2, 2, 1 and 1
        found = torch.load(tmp_path / str(rank) / "weights.pt")
        torch.testing.assert_close(found, trained(6)[0], atol=1e-6, rtol=0)


def test_gradients_stay_in_the_buckets_of_ddp_while_they_are_accumulated():
    """zero_grad() set them to None: each step made a second copy of them all, 4.7 GB at 1b."""
    pretrain.setup_distributed("cpu")
    weights, places = trained(2, steps=4)  # the buckets are final by then
    assert len(places) == 3 * len(weights)
    assert set(places) == {weight.grad.data_ptr() for weight in weights}


def test_fp32_master_weights_move_at_a_learning_rate_of_1e_6(gpt):
    """In bf16 weights an update of 1e-6 is rounded away (AReaL#1634)."""
    before, optimizer = gpt.embed.weight.clone(), torch.optim.AdamW(gpt.parameters(), 1e-6)
    with pretrain.autocast("bfloat16", CPU.device):
        loss = pretrain.next_token_loss(gpt, torch.randint(50, (2, 9)))
    loss.backward()
    optimizer.step()
    assert gpt.embed.weight.dtype == torch.float32
    assert (gpt.embed.weight != before).float().mean() > 0.5


class Spy(TorchDispatchMode):
    names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_a_training_step_never_waits_for_the_device():
    """A .item() or a mask's indices in the loop would idle a GPU until the host has answered."""
    pretrain.setup_distributed("cpu")
    trained(2, within=Spy())
    assert "mm" in Spy.names and not Spy.names & {"_local_scalar_dense", "nonzero", "item"}


def test_without_a_compiler_a_sentence_is_enough(tmp_path, data_dir, monkeypatch, capsys):
    long = RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: failing(long))
    evaluation = pretrain.main(settings(tmp_path, data_dir, compile=True, max_steps=2))
    printed = capsys.readouterr().out
    assert "going on without --compile, which fails here (InvalidCxxCompiler: No work" in printed
    assert "long story" not in printed and evaluation["step"] == 2


# ---------------------------------------------------------------- a run's folder


def test_the_run_folder_holds_what_the_design_promises(base, data_dir):
    names = {"config.json", "metrics.jsonl", "mixture.json", "ckpt.pt"}
    assert {p.name for p in Path(base).iterdir()} == names
    where = json.loads((Path(base) / "config.json").read_text())["run"]
    assert where.keys() == {"argv", "torch_version", "device", "world_size", "inputs"}
    assert parse_config(Config, {}, [f"--config={base}/config.json"]).max_steps == 6
    found, shares = rows(base), json.loads((Path(base) / "mixture.json").read_text()).values()
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["kind"] == "eval" and found[-1]["loss"]["toy-omi1"] < found[0]["loss"]
    assert sum(corpus["share"] for corpus in shares) == pytest.approx(1)


def test_keep_every_leaves_snapshots_that_rl_can_start_from(tmp_path, data_dir):
    pretrain.main(settings(tmp_path, data_dir, keep_every=3))
    kept = sorted(tmp_path.glob("step_*.pt"))
    assert [file.name for file in kept] == ["step_000003.pt", "step_000006.pt", "step_000008.pt"]
    models = [pretrain.load_model(path, "cpu") for path in (kept[-1], tmp_path)]
    assert models[0][1] == "toy" and pretrain.fingerprint(models[0][0]) == pretrain.fingerprint(
        models[1][0]) != pretrain.fingerprint(pretrain.load_model(kept[0], "cpu")[0])


def test_a_finished_run_says_so_and_changes_nothing(whole, data_dir, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    evaluation = pretrain.main(settings(whole, data_dir))
    assert "is finished" in capsys.readouterr().out and evaluation["step"] == 8
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_overwrite_clears_a_run_through_a_link_and_nothing_else(tmp_path, data_dir):
    """A folder that was a symbolic link ended in an OSError."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not of a run like this"):
        pretrain.main(settings(tmp_path, data_dir, overwrite=True))
    assert os.listdir(tmp_path) == ["thesis.tex"]
    pretrain.main(settings(tmp_path / "run", data_dir, keep_every=1))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    pretrain.main(settings(tmp_path / "link", data_dir, overwrite=True, max_steps=1))
    assert not list((tmp_path / "run").glob("step_*")) and checkpoint(tmp_path / "run")["step"] == 1
    assert [row["kind"] for row in rows(tmp_path / "run")] == ["train", "eval"]


def test_two_processes_do_not_work_in_one_folder(tmp_path, data_dir):
    """Both trained, and their rows interleaved in one metrics.jsonl."""
    cfg = settings(tmp_path, data_dir)
    with pretrain.Run(cfg, pretrain.setup_distributed("cpu"), 8, {"a": 1}):
        with pytest.raises(UserError, match="another process works in"):
            pretrain.main(cfg)


@pytest.mark.parametrize("name, content, message", [
    ("config.json", b"", "not of a run"), ("config.json", None, "not of a run"),
    ("config.json", b'{"preset', "cannot be read"), ("config.json", b"[1]", "cannot be read"),
    ("config.json", b'{"model_type": "llama"}', "not of a run like this"),
    ("metrics.jsonl", None, "is shorter than"), ("metrics.jsonl", b"{}\n", "is shorter than"),
    ("ckpt.pt", b"not a checkpoint", "ckpt.pt cannot be read")])
def test_a_damaged_or_foreign_file_of_a_run_is_a_sentence_that_helps(
        whole, tmp_path, data_dir, name, content, message):
    """A deleted metrics.jsonl was continued with NUL bytes, an empty config.json a traceback."""
    file = Path(shutil.copytree(whole, tmp_path / "run")) / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        pretrain.main(settings(tmp_path / "run", data_dir))
    if "--overwrite=true" in str(raised.value):
        pretrain.main(settings(tmp_path / "run", data_dir, overwrite=True, max_steps=1))
        assert len(rows(tmp_path / "run")) == 2


def test_a_run_does_not_go_on_with_other_tokens(tmp_path, whole, data_dir):
    """Inputs were told apart by their names: a replaced file was trained on without a word."""
    file = Path(shutil.copytree(whole, tmp_path / "run")) / "config.json"
    file.write_text(re.sub(r'("content of toy-omi1": ")\w+', r"\1another", file.read_text()))
    with pytest.raises(UserError, match="with another content of toy-omi1 .another there"):
        pretrain.main(settings(tmp_path / "run", data_dir))


# ---------------------------------------------------------------- stopping and continuing


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(
        tmp_path, data_dir, whole):
    """kill -9 before a random touch of a file: of a row, a checkpoint, a rename, a clean-up."""
    moments, deaths = random.Random(0), 0
    while run(tmp_path, pretraining(data_dir, functools.partial(
            killed_at_file_event, moments.randint(1, 24)))) != [0]:
        deaths += 1
        assert deaths < 30, (tmp_path / "0" / "stderr").read_text()
    assert deaths > 3
    assert_same_run(tmp_path / "0" / "run", whole)


def test_two_ranks_train_as_one_and_rank_0_alone_writes(tmp_path, data_dir, whole):
    assert run(tmp_path, pretraining(data_dir), world=2) == [0, 0]
    assert_same_run(tmp_path / "0" / "run", whole, atol=1e-6, rtol=1e-5)
    # the ranks have working folders of their own: what rank 1 wrote would be in its own
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"stdout", "stderr"}


def test_a_run_continues_with_what_does_not_change_its_result(tmp_path, data_dir, whole):
    """--micro_batch_size was advised when memory ran out, and then refused. More ranks go too."""
    killed = functools.partial(signalled_at_batch, 5, [signal.SIGKILL], 0)
    where = dict(out_dir=tmp_path / "run")
    assert run(tmp_path, pretraining(data_dir, killed, **where)) == [-signal.SIGKILL]
    assert checkpoint(tmp_path / "run")["step"] == 3
    assert run(tmp_path, pretraining(data_dir, **where, micro_batch_size=1), world=2) == [0, 0]
    assert_same_run(tmp_path / "run", whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("numbers, world", [
    ([signal.SIGINT], 1), ([signal.SIGTERM], 2), ([signal.SIGINT] * 2, 1)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_the_run_goes_on(
        tmp_path, data_dir, whole, numbers, world):
    """torchrun may forward a Ctrl-C that the terminal has sent already: two are one."""
    warned = functools.partial(signalled_at_batch, 4, numbers, world - 1)
    assert run(tmp_path, pretraining(data_dir, warned), world) == [0] * world
    assert "stopped at step 5" in (tmp_path / "0" / "stdout").read_text()
    assert checkpoint(tmp_path / "0" / "run")["step"] == 5
    assert run(tmp_path, pretraining(data_dir)) == [0]
    tolerance = dict(atol=1e-6, rtol=1e-5) if world > 1 else {}
    assert_same_run(tmp_path / "0" / "run", whole, **tolerance)


def signalled_in_evaluation(rank: int) -> None:
    held_out = pretrain.Mixture.held_out
    pretrain.Mixture.held_out = lambda self, name: (
        os.kill(os.getpid(), signal.SIGTERM), held_out(self, name))[1]


def test_a_signal_ends_an_evaluation_which_is_made_up_for(tmp_path, data_dir, whole):
    """It was noted and forgotten until all corpora had been evaluated."""
    assert run(tmp_path, pretraining(data_dir, signalled_in_evaluation)) == [0]
    folder = tmp_path / "0" / "run"
    assert checkpoint(folder)["step"] == 6 and rows(folder)[-1]["kind"] == "train"
    assert run(tmp_path, pretraining(data_dir)) == [0]
    assert_same_run(folder, whole)


def test_a_rank_that_dies_ends_the_others_with_a_sentence(tmp_path, data_dir):
    killed = functools.partial(signalled_at_batch, 5, [signal.SIGKILL], 1)
    assert run(tmp_path, pretraining(data_dir, killed), world=2) == [2, -signal.SIGKILL]
    printed = (tmp_path / "0" / "stderr").read_text()
    assert printed.startswith("pretrain.py: another process of this run has died")
    assert checkpoint(tmp_path / "0" / "run")["step"] == 3


def test_a_run_gives_signals_and_folder_back_also_where_it_fails(tmp_path, data_dir, monkeypatch):
    """A pool that is forked after a run, in a notebook, ends its workers with SIGTERM."""
    handlers = [signal.default_int_handler, signal.SIG_DFL]
    monkeypatch.setattr(pretrain, "train_step", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError) as kept:
        pretrain.main(settings(tmp_path, data_dir))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    assert pretrain.main(settings(tmp_path, data_dir))["step"] == 8 and kept


@pytest.mark.parametrize("log_every, save_every, kept", [(1, 3, 3), (100, 2, 4), (100, 100, None)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
        tmp_path, data_dir, monkeypatch, log_every, save_every, kept):
    losses, loss = itertools.count(1), pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", lambda model, blocks: loss(model, blocks) * (
        float("nan") if next(losses) == 5 else 1))
    every = dict(log_every=log_every, save_every=save_every, eval_every=100, keep_every=save_every)
    with pytest.raises(UserError, match="not all numbers are finite.*another --out_dir"):
        pretrain.main(settings(tmp_path, data_dir, **every))
    saved = [torch.load(file, weights_only=True) for file in tmp_path.glob("*.pt")]
    assert bool(saved) == bool(kept) and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    for state in saved:
        assert state.get("step", kept) == kept
        assert all(weight.isfinite().all() for weight in state["model"].values())


def disk_full_after(step: int, size: int, rank: int) -> None:
    """From a step on no file may grow beyond `size` bytes."""
    import resource

    before_batch(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


@pytest.mark.parametrize("size, file", [(20_000, "ckpt.pt"), (300, "metrics.jsonl")])
def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, data_dir, size, file):
    full = functools.partial(disk_full_after, 4, size)
    assert run(tmp_path, pretraining(data_dir, full)) == [2]
    printed = (tmp_path / "0" / "stderr").read_text()
    assert printed.startswith(f"pretrain.py: run/{file} could not be written")
    assert len(printed.splitlines()) == 1 and "mend that and start again" in printed
    assert checkpoint(tmp_path / "0" / "run")["step"] == 3
    assert not list((tmp_path / "0" / "run").glob("*.tmp"))


def without_unix(rank: int) -> None:
    sys.modules |= {"fcntl": None, "resource": None}
    os.environ["PATH"] = ""  # no git
    del os.fork, os.sched_getaffinity
    pretrain.ctypes.CDLL = failing(OSError("no such library"))


def test_what_only_unix_has_is_done_without(tmp_path, data_dir, whole):
    """No script started on Windows, or where there is no git."""
    assert run(tmp_path, pretraining(data_dir, without_unix)) == [0]
    assert_same_run(tmp_path / "0" / "run", whole)
