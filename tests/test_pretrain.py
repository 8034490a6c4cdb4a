import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import pretrain
from conftest import ROOT, SMALL
from data import UserError
from model import GPT, GPTConfig
from pretrain import Config, Processes, parse_config, schedule

CPU = Processes(0, 1, torch.device("cpu"))
NO_CAST = torch.autocast("cpu", enabled=False)
# two corpora, for a short evaluation; at this rate Adam does not magnify rounding errors
QUICK = {**SMALL, "mix": "toy-tinygsm,toy-omi1", "context": 64, "max_steps": 8, "init_std": 0.1,
         "learning_rate": 1e-3}  # fmt: skip


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
    left_weights, right_weights = checkpoint(left)["model"], checkpoint(right)["model"]
    for name in left_weights:
        if tolerance:
            torch.testing.assert_close(left_weights[name], right_weights[name], **tolerance)
        else:
            assert torch.equal(left_weights[name], right_weights[name])
    for ours, theirs in zip(rows(left), rows(right), strict=True):
        assert ours["step"] == theirs["step"] and ours["kind"] == theirs["kind"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if tolerance else 0, abs=0)
        assert ours.get("learning_rate") == theirs.get("learning_rate")


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
                   "MASTER_PORT": str(port)}  # fmt: skip
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
             for rank in range(world)]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()  # one that hangs has the status -9, which no test expects of it
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
    """Calls act() when the batch of a step is fetched."""
    batch = pretrain.Mixture.batch

    def watched(self, wanted):
        if wanted == step:
            act()
        return batch(self, wanted)

    pretrain.Mixture.batch = watched


def killed_at_batch(step: int, number: int, victim: int, rank: int) -> None:
    """Rank `victim` gets a signal while a step's batch is fetched: after `step` updates."""
    if rank == victim:
        before_batch(step, lambda: os.kill(os.getpid(), number))


def killed_at_file_event(count: int, rank: int) -> None:
    """kill -9 at the count-th time that a file is opened, renamed, cut or deleted."""
    events = itertools.count(1)

    def watch(event, args):
        if event in ("open", "os.rename", "os.truncate", "os.remove") and "run/" in str(args[0]):
            if next(events) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def disk_full_after(step: int, size: int, rank: int) -> None:
    """From a step on no file may grow beyond `size` bytes."""
    before_batch(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, base) -> Path:
    """The folder of a run of 8 steps that nothing disturbed, on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, pretraining(data_dir)) == [0]
    return folder / "0" / "run"


# ---------------------------------------------------------------- configuration


def test_flags_take_both_spellings_and_the_types_of_their_fields():
    argv = "--learning_rate=0.5 --batch_size 32 --compile=true --tied false --mix=a:2".split()
    cfg = parse_config(Config, pretrain.PRESETS, argv)
    assert (cfg.learning_rate, cfg.batch_size, cfg.compile, cfg.tied) == (0.5, 32, True, False)
    assert cfg.mix == "a:2"


def test_precedence_is_dataclass_then_preset_then_file_then_flags(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "150m", "layers": 3, "width": 24, "run": {"argv": []}}))
    cfg = parse_config(Config, pretrain.PRESETS, [f"--config={file}", "--width=48"])
    assert (cfg.beta1, cfg.heads, cfg.layers, cfg.width) == (Config.beta1, 12, 3, 48)


def test_the_resolved_config_of_a_run_is_accepted_by_config(base):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--config={base}/config.json"])
    assert cfg.max_steps == 6 and cfg.width == 32


@pytest.mark.parametrize("argv, message", [
    (["--learing_rate=1"], "unknown argument --learing_rate; did you mean --learning_rate"),
    (["--batch_size=many"], "--batch_size=many: a whole number"),
    (["--batch_size"], "needs a value"), (["--compile=maybe"], "true or false"),
    (["--dtype=float3"], "choose from auto, float32, bfloat16; did you mean float32"),
    (["--preset=150"], "did you mean 150m"), (["batch_size=3"], "unknown argument"),
    (["--config=none.json"], "none.json"),
])  # fmt: skip
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_config(Config, pretrain.PRESETS, argv)
    assert "\n" not in str(raised.value)


def test_help_prints_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, pretrain.PRESETS, ["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        lines = [x for x in printed.splitlines() if x.strip().startswith(field.name + ":")]
        assert len(lines) == 1 and "  # " in lines[0]


def base_settings(base, data_dir) -> Config:
    return Config(out_dir=base, data_dir=data_dir, max_steps=6, init_std=0.1, **SMALL)


@pytest.mark.parametrize("change, message", [
    (dict(batch_size=0), "--batch_size=0 must be above 0"), (dict(learning_rate=1.0), "learning_r"),
    (dict(heads=3), "multiple of 2 x heads"), (dict(mix="toy-tiny"), "unknown corpus 'toy-tiny'"),
    (dict(mix="toy-omi1:2,toy-omi2:50%"), "not both"),
    (dict(device="tpu"), "--device=tpu cannot be used"),
    (dict(max_steps=9), "holds a run with another max_steps"),
])  # fmt: skip
def test_a_mistake_is_a_sentence_and_costs_no_file(base, data_dir, change, message):
    before = {file: file.read_bytes() for file in Path(base).iterdir()}
    cfg = dataclasses.replace(base_settings(base, data_dir), **change)
    with pytest.raises(UserError, match=message):
        pretrain.main(cfg)
    assert {file: file.read_bytes() for file in Path(base).iterdir()} == before


def test_overwrite_spares_a_folder_that_is_no_run(tmp_path, data_dir):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run's folder"):
        pretrain.main(settings(tmp_path, data_dir, overwrite=True))
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("argv", [["--batch_size=x"], ["--mix=nothing", "--out_dir=unused"]])
def test_a_mistake_prints_one_line_and_exits_with_2(argv, tmp_path):
    assert run(tmp_path, functools.partial(script, argv, None), world=2) == [2, 2]
    printed = [(tmp_path / rank / "stderr").read_text() for rank in "01"]
    assert printed[0].startswith("pretrain.py: ") and len(printed[0].splitlines()) == 1
    assert printed[1] == "" and not (tmp_path / "0" / "unused").exists()


def test_the_script_runs_as_a_command():
    command = [sys.executable, ROOT / "pretrain.py", "--help"]
    assert "preset: " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("preset, width, layers, heads, tied, micro", [
    ("150m", 768, 12, 12, False, 16), ("1b", 2048, 16, 16, True, 8)])  # fmt: skip
def test_the_paper_s_presets_have_its_settings(preset, width, layers, heads, tied, micro):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--preset={preset}"])
    assert (cfg.width, cfg.layers, cfg.heads, cfg.tied) == (width, layers, heads, tied)
    assert (cfg.context, cfg.batch_size, cfg.micro_batch_size) == (2048, 512, micro)
    assert (cfg.rope_base, cfg.init_std, cfg.tokenizer) == (10_000, 0.02, "gpt2")
    assert (cfg.learning_rate, cfg.min_learning_rate, cfg.warmup_steps) == (1e-3, 0.1, 5000)
    assert (cfg.weight_decay, cfg.grad_clip, cfg.max_steps) == (0.1, 1.0, 0)
    small = dataclasses.replace(cfg, width=2 * heads, layers=1)
    model = pretrain.build_model(small, 100, torch.device("cpu"))
    optimizer = pretrain.build_optimizer(small, model)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    decayed = [p for group in optimizer.param_groups for p in group["params"]
               if group["weight_decay"] == 0.1]  # fmt: skip
    assert len(decayed) == len(list(model.parameters()))  # everything decays


@pytest.mark.parametrize("preset, vocab_size, total", [
    ("tiny", 836, 375_168), ("20m", 50_257, 21_254_400), ("60m", 50_257, 59_286_016),
    ("150m", 50_257, 190_440_960), ("150m", 32_000, 162_398_208), ("1b", 50_257, 1_176_668_160),
    ("1b", 32_000, 1_139_277_824)])  # fmt: skip
def test_every_part_of_a_preset_has_the_parameters_of_its_formula(preset, vocab_size, total):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--preset={preset}"])
    with torch.device("meta"):
        model = pretrain.build_model(cfg, vocab_size, torch.device("meta"))
    C, V = cfg.width, vocab_size
    counts = {name: p.numel() for name, p in model.named_parameters()}
    expected = {"embed.weight": V * C} | ({} if cfg.tied else {"head.weight": V * C})
    for i in range(cfg.layers):
        parts = {"attention.qkv": 3 * C * C, "attention.out": C * C, "mlp.gate": 4 * C * C,
                 "mlp.up": 4 * C * C, "mlp.down": 4 * C * C}  # fmt: skip
        expected |= {f"blocks.{i}.{part}.weight": count for part, count in parts.items()}
    assert counts == expected and sum(counts.values()) == total


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.5])
def test_the_learning_rate_is_above_zero_at_the_first_step_and_ends_at_its_floor(warmup):
    rates = [schedule((step + 1) / 100, warmup, 0.1) for step in range(100)]
    assert rates[0] > 0 and max(rates) <= 1 and rates[-1] == pytest.approx(0.1)
    assert schedule(0.7, warmup, 1.0) == 1.0


def gradient(micro_batch_size: int, processes=CPU) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = dict(vocab_size=30, context=16, width=16, layers=1, heads=2, init_std=0.2)
    model = GPT(GPTConfig(**shape)).double()
    blocks = torch.randint(30, (6, 17))
    blocks[4] = -1  # the padding of a last batch: were micro-batches averaged, splits would differ
    mine = blocks[processes.rank :: processes.world]
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    pretrain.accumulate(ddp, mine, 80, micro_batch_size, NO_CAST, processes)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_gradient_is_the_same_for_every_way_to_split_a_batch(micro_batch_size):
    """The mean of the micro-batches' means weighs short ones too much (transformers#34191)."""
    pretrain.setup_distributed("cpu")
    for ours, expected in zip(gradient(micro_batch_size), gradient(6)):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def save_gradient(rank: int) -> None:
    processes = pretrain.setup_distributed("cpu")
    torch.save(gradient(1, processes), "gradient.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_the_gradient_of_several_ranks_is_that_of_one(tmp_path, world):
    """The mean over ranks of their means weighs them wrongly (transformers#34242)."""
    assert run(tmp_path, save_gradient, world) == [0] * world
    pretrain.setup_distributed("cpu")
    expected = gradient(6)
    for rank in range(world):  # ranks with 3 and 3 rows; with 2, 2, 1 and 1
        for ours, theirs in zip(torch.load(tmp_path / str(rank) / "gradient.pt"), expected):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_loss_is_the_cross_entropy_of_each_next_token(gpt):
    ids = torch.randint(50, (2, 9))
    logp = gpt(ids[:, :-1]).log_softmax(-1)
    expected = -sum(logp[b, t, ids[b, t + 1]] for b in range(2) for t in range(8))
    torch.testing.assert_close(pretrain.next_token_loss(gpt, ids), expected)


def test_fp32_master_weights_move_at_a_learning_rate_of_1e_6():
    """In bf16 weights an update of 1e-6 is rounded away (AReaL#1634)."""
    model = GPT(GPTConfig(vocab_size=30, context=16, width=16, layers=1, heads=2))
    before = model.embed.weight.clone()
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-6, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pretrain.next_token_loss(model, torch.randint(30, (2, 9)))
    loss.backward()
    optimizer.step()
    moved = (model.embed.weight != before).float().mean()
    assert model.embed.weight.dtype == torch.float32 and moved > 0.5


def test_the_run_folder_holds_what_the_design_promises(base):
    names = {"config.json", "metrics.jsonl", "mixture.json", "ckpt.pt"}
    assert {p.name for p in Path(base).iterdir()} == names
    where = json.loads((Path(base) / "config.json").read_text())["run"]
    assert where.keys() == {"argv", "git_commit", "torch_version", "device", "world_size"}
    found = rows(base)
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(r["learning_rate"] > 0 for r in found if r["kind"] == "train")
    assert found[-1]["kind"] == "eval"
    assert set(found[-1]["loss"]) == {"toy-tinygsm", "toy-omi1", "toy-omi2"}
    assert found[-1]["loss"]["toy-omi1"] < found[0]["loss"]  # it learns
    shares = [c["share"] for c in json.loads((Path(base) / "mixture.json").read_text()).values()]
    assert sum(shares) == pytest.approx(1)


def test_keep_every_leaves_snapshots_that_rl_can_start_from(tmp_path, data_dir):
    pretrain.main(settings(tmp_path / "run", data_dir, keep_every=3))
    kept = sorted(file.name for file in (tmp_path / "run").glob("step_*.pt"))
    assert kept == ["step_000003.pt", "step_000006.pt", "step_000008.pt"]
    model, tokenizer = pretrain.load_model(tmp_path / "run" / kept[-1], "cpu")
    last = checkpoint(tmp_path / "run")["model"]
    assert tokenizer == "toy"
    assert all(torch.equal(weight, last[name]) for name, weight in model.state_dict().items())


class Spy(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_a_training_step_never_waits_for_the_device():
    """A .item() or a mask's indices in the loop would idle a GPU until the host has answered."""
    cfg, processes = Config(**QUICK), pretrain.setup_distributed("cpu")
    model = pretrain.build_model(cfg, 50, processes.device)
    optimizer, ddp = pretrain.build_optimizer(cfg, model), pretrain.wrap(cfg, model, NO_CAST, CPU)
    blocks, spy = torch.randint(50, (4, 65)), Spy()
    with spy:
        pretrain.train_step(ddp, optimizer, blocks, 256, 1e-3, cfg, NO_CAST, processes)
    assert "mm" in spy.names and not spy.names & {"_local_scalar_dense", "nonzero", "item"}


def test_without_a_compiler_a_sentence_is_printed_and_the_run_goes_on(
    tmp_path, data_dir, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: fails)
    evaluation = pretrain.main(settings(tmp_path / "run", data_dir, compile=True, max_steps=2))
    printed = capsys.readouterr().out
    assert "going on without --compile, which fails here (InvalidCxxCompiler: No work" in printed
    assert "long story" not in printed and evaluation["step"] == 2


class Shared(typing.NamedTuple):
    """One of several ranks, without the others: its sums are its own."""

    rank: int
    world: int
    device: torch.device = torch.device("cpu")

    def sum(self, *values):
        return values


def test_evaluation_is_spread_over_the_ranks(gpt, monkeypatch):
    class Held:
        names = ["toy"]

        def held_out(self, name):
            return torch.arange(5 * 9).view(5, 9).numpy()

    def note(model, blocks):
        seen.extend(blocks[:, 0].tolist())
        return torch.zeros(())

    monkeypatch.setattr(pretrain, "next_token_loss", note)
    for world, expected in ((1, [[0, 9, 18, 27, 36]]), (2, [[0, 18, 36], [9, 27]])):
        for rank in range(world):
            seen = []
            pretrain.held_out_losses(gpt, Held(), 2, NO_CAST, Shared(rank, world))
            assert seen == expected[rank]


# ---------------------------------------------------------------- reliability


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(
    tmp_path, data_dir, whole
):
    """kill -9 before a random touch of a file: of a row, a checkpoint, a rename, a clean-up."""
    moments, deaths = random.Random(0), 0
    while run(tmp_path, pretraining(data_dir, functools.partial(
            killed_at_file_event, moments.randint(1, 24)))) != [0]:  # fmt: skip
        deaths += 1
        assert deaths < 30, (tmp_path / "0" / "stderr").read_text()
    assert deaths > 3
    assert_same_run(tmp_path / "0" / "run", whole)


def test_two_ranks_train_as_one_and_rank_0_alone_writes(tmp_path, data_dir, whole):
    assert run(tmp_path, pretraining(data_dir), world=2) == [0, 0]
    assert_same_run(tmp_path / "0" / "run", whole, atol=1e-6, rtol=1e-5)
    # the ranks have working folders of their own: what rank 1 wrote would be in its own
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"stdout", "stderr"}


def test_a_run_that_continues_on_more_ranks_sees_the_same_data(tmp_path, data_dir, whole):
    out_dir = tmp_path / "run"
    killed = functools.partial(killed_at_batch, 5, signal.SIGKILL, 0)
    assert run(tmp_path, pretraining(data_dir, killed, out_dir=out_dir)) == [-signal.SIGKILL]
    assert checkpoint(out_dir)["step"] == 3
    assert run(tmp_path, pretraining(data_dir, out_dir=out_dir), world=2) == [0, 0]
    assert_same_run(out_dir, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_within_a_step_exits_with_0_and_the_run_goes_on(
    tmp_path, data_dir, whole, number
):
    warned = functools.partial(killed_at_batch, 5, number, 0)
    assert run(tmp_path, pretraining(data_dir, warned)) == [0]
    assert "stopped at step 5" in (tmp_path / "0" / "stdout").read_text()
    assert checkpoint(tmp_path / "0" / "run")["step"] == 5
    assert run(tmp_path, pretraining(data_dir)) == [0]
    assert_same_run(tmp_path / "0" / "run", whole)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, data_dir):
    warned = functools.partial(killed_at_batch, 5, signal.SIGTERM, 1)
    assert run(tmp_path, pretraining(data_dir, warned), world=2) == [0, 0]
    assert checkpoint(tmp_path / "0" / "run")["step"] == 5


def test_a_run_gives_the_signals_back(base, data_dir):
    """A pool that is forked after a run, in a notebook, ends its workers with SIGTERM."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    pretrain.main(base_settings(base, data_dir))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert before == [signal.default_int_handler, signal.SIG_DFL]


def test_a_rank_that_dies_ends_the_others_with_a_sentence(tmp_path, data_dir):
    killed = functools.partial(killed_at_batch, 5, signal.SIGKILL, 1)
    assert run(tmp_path, pretraining(data_dir, killed), world=2) == [1, -signal.SIGKILL]
    printed = (tmp_path / "0" / "stderr").read_text()
    assert printed.startswith("pretrain.py: another process of this run has died")
    assert checkpoint(tmp_path / "0" / "run")["step"] == 3


def test_a_finished_run_says_so_and_changes_nothing(base, data_dir, capsys):
    before = (Path(base) / "metrics.jsonl").read_bytes()
    evaluation = pretrain.main(base_settings(base, data_dir))
    assert "is finished" in capsys.readouterr().out and evaluation["step"] == 6
    assert (Path(base) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("log_every, save_every, kept", [(1, 3, 3), (100, 2, 4), (100, 100, None)])
def test_a_loss_that_is_not_finite_stops_names_its_step_and_is_never_saved(
    tmp_path, data_dir, monkeypatch, log_every, save_every, kept
):
    """Reports are read when a row or a save is due: the step is named even if that is later."""
    losses, next_token_loss = itertools.count(1), pretrain.next_token_loss

    def diverge(model, blocks):
        return next_token_loss(model, blocks) * (float("nan") if next(losses) == 5 else 1)

    monkeypatch.setattr(pretrain, "next_token_loss", diverge)
    every = dict(log_every=log_every, save_every=save_every, eval_every=100, keep_every=save_every)
    with pytest.raises(UserError, match="the loss is nan, .* at step 5: lower --learning_rate"):
        pretrain.main(settings(tmp_path / "run", data_dir, **every))
    saved = sorted((tmp_path / "run").glob("*.pt"))
    assert bool(saved) == bool(kept) and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    for file in saved:
        state = torch.load(file, weights_only=True)
        assert state.get("step", 0) in (0, kept)
        assert all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize("size, file", [(20_000, "ckpt.pt"), (300, "metrics.jsonl")])
def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, data_dir, size, file):
    full = functools.partial(disk_full_after, 4, size)
    assert run(tmp_path, pretraining(data_dir, full)) == [2]
    printed = (tmp_path / "0" / "stderr").read_text()
    assert printed.startswith(f"pretrain.py: run/{file} could not be written")
    assert len(printed.splitlines()) == 1 and "make room and start again" in printed
    assert checkpoint(tmp_path / "0" / "run")["step"] == 3
    assert not list((tmp_path / "0" / "run").glob("*.tmp"))


def test_out_of_memory_names_the_flag_to_lower(tmp_path, data_dir, monkeypatch):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pretrain, "train_step", greedy)
    with pytest.raises(UserError, match="out of memory: lower --micro_batch_size, 4 now"):
        pretrain.main(settings(tmp_path, data_dir))


def test_a_run_does_not_go_on_with_other_tokens(tmp_path, base, data_dir):
    shutil.copytree(base, tmp_path / "run")
    file = tmp_path / "run" / "mixture.json"
    then = json.loads(file.read_text())
    then["toy-omi1"]["sha256"] = "0" * 64
    file.write_text(json.dumps(then))
    with pytest.raises(UserError, match="the tokens of toy-omi1 are not those"):
        pretrain.main(base_settings(str(tmp_path / "run"), data_dir))
    assert json.loads(file.read_text()) == then


def test_a_corrupt_checkpoint_is_named(tmp_path, data_dir):
    pretrain.main(settings(tmp_path / "run", data_dir, max_steps=1))
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="ckpt.pt is not a readable checkpoint"):
        pretrain.main(settings(tmp_path / "run", data_dir, max_steps=1))


def test_a_checkpoint_of_another_architecture_is_refused(base, tmp_path):
    state = checkpoint(base)
    state["gpt"]["width"] = 64
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        pretrain.load_model(tmp_path / "other.pt", "cpu")


# ---------------------------------------------------------------- bench.py


def test_bench_train_prints_one_table(capsys):
    flags = [f"--{k}={v}" for k, v in {**QUICK, "max_steps": 2}.items()]
    bench.COMMANDS["train"](flags)
    printed = capsys.readouterr().out
    for name in ("parameters", "tokens/s", "GFLOP/s", "peak memory"):
        assert name in printed
